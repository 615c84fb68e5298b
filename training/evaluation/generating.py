"""Samples of a model: conditions of held-out images, noise from seed and number alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.base.frozen import FrozenBase
from training.evaluation.heldout import HeldOutImages
from training.evaluation.prepare import Evaluation
from training.evaluation.spec import How
from training.objective.sampling import condition, draw_images, is_guided, noises


class Generated(NamedTuple):
    """A batch of samples.

    Args:
        first: the number of the first of them.
        pictures: (B, C, H, W) in [-1, 1] on the CPU; of videos (B, C, frames, H, W).
        captions: that they were drawn from; None for bases without.
        labels: the classes (B,) that they were drawn from; None for bases without.
    """

    first: int
    pictures: Tensor
    captions: list[str] | None
    labels: Tensor | None


def generate(
    evaluation: Evaluation,
    frozen: FrozenBase,
    how: How,
    held_out: HeldOutImages,
    count: int,
    purpose: tuple[object, ...] = (),
) -> Iterator[Generated]:
    """Draws samples batch by batch.

    Args:
        frozen: the base, with whatever is on it.
        held_out: whose conditions they get.
        count: of samples.
        purpose: what their noise depends on, besides the seed and their number.
    """
    options, scale = evaluation.options, how.scale
    guided = is_guided(frozen, scale)
    labelled = frozen.kind.conditioning == "label"
    blank = condition(frozen, evaluation.encoders, None, (1, 1), scale) if guided else None
    for numbers, inputs, captions in held_out.conditions(count):
        conditional = {**inputs.given, "guidance": torch.full((len(numbers),), scale)}
        unconditional = None if blank is None else _unconditional(blank, conditional, len(numbers))
        names = [(*purpose, options.seed, number) for number in numbers]
        noise, sources = noises(names, tuple(inputs.clean.shape[1:]))
        pictures = draw_images(
            frozen, noise.to(evaluation.device), conditional, unconditional,
            steps=how.steps, scale=scale, sampler=how.sampler, generators=sources,
            guided=options.guided_channels,
        )  # fmt: skip
        labels = inputs.given["labels"].cpu() if labelled else None
        yield Generated(numbers[0], pictures, captions, labels)


def _unconditional(
    blank: Mapping[str, Tensor], conditional: Mapping[str, Tensor], count: int
) -> dict[str, Any]:
    """No condition for each of a batch, at the sizes and with the first frames of its pictures."""
    same = ("sizes", "guidance")
    repeated = {n: v.expand(count, *v.shape[1:]) for n, v in blank.items() if n not in same}
    return {**conditional, **repeated}


@dataclass
class Calls:
    """How many items a model was called with."""

    items: int = 0


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[Calls]:
    """Counts the items of all calls of a model, until the context ends."""
    calls = Calls()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.items += len(inputs[0])

    handle = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
