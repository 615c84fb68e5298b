"""Measures one model: its losses on held-out images, and the metrics of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.base.precision import DTYPES
from training.evaluation.comparison import bootstrap
from training.evaluation.differences import ModelResult
from training.evaluation.features import Features
from training.evaluation.heldout import NAME
from training.evaluation.models import Compared
from training.evaluation.prepare import Evaluation
from training.evaluation.spec import BASE
from training.objective.losses import losses_by_bin
from training.objective.sampling import condition, draw_images, is_guided, noises
from training.objective.student import Student


def measure(evaluation: Evaluation, model: Compared | None) -> ModelResult:
    """Loss, samples and metrics of one model, or of the base."""
    options = evaluation.options
    name = BASE if model is None else f"{model.spec.label} ({model.spec.path})"
    print(f"{name}: held-out loss", flush=True)
    on: AbstractContextManager[FrozenBase] = (
        nullcontext(evaluation.frozen) if model is None else model.on(evaluation.frozen)
    )
    with on as frozen, _precision(evaluation):
        student = Student(frozen, None, evaluation.process, evaluation.config).eval()
        losses = torch.cat(
            [
                losses_by_bin(
                    student, evaluation.process, inputs.to(evaluation.device),
                    bins=options.loss_bins, draws=options.loss_draws, name=(NAME, options.seed),
                )
                for inputs in evaluation.held_out.inputs
            ]
        )  # fmt: skip
        result = ModelResult(losses)
        if options.samples:
            _sample(evaluation, frozen, result, name)
    if not bool(losses.isfinite().all()):
        raise PatchError(
            f"expected finite losses, found others for {name}: the model is broken, or "
            "--mixed_precision is too coarse for it."
        )
    return result


def _sample(evaluation: Evaluation, frozen: FrozenBase, result: ModelResult, name: str) -> None:
    """Draws all samples; of each batch features are kept, and of the first pictures too."""
    options, parts, scores = evaluation.options, [], []
    for numbers, pictures, captions in generate(evaluation, frozen):
        if evaluation.extractor is not None:
            parts.append(evaluation.extractor(pictures))
        if evaluation.clip is not None and captions is not None:
            scores.append(evaluation.clip(pictures, captions))
        result.pictures += list(pictures[: max(0, options.grid - len(result.pictures))])
        result.samples = numbers[-1] + 1
        end = "\n" if result.samples == options.samples else ""
        print(f"\r{name}: sample {result.samples} of {options.samples}", end=end, flush=True)
    if evaluation.reference is not None:
        features = Features.joined(parts)
        result.measured = evaluation.reference.measure(features, options.seed)
        result.drawn = bootstrap(features, evaluation.reference, evaluation.rows)
    if scores:
        result.measured.single["clip_score"] = torch.cat(scores)
        result.measured.values["clip_score"] = float(torch.cat(scores).mean())


def generate(
    evaluation: Evaluation, frozen: FrozenBase
) -> Iterator[tuple[list[int], Tensor, list[str] | None]]:
    """Numbers of samples, pictures (B, C, H, W) in [-1, 1] on the CPU, and their captions."""
    options, scale = evaluation.options, evaluation.scale
    guided = is_guided(frozen, scale)
    blank = condition(frozen, evaluation.encoders, None, (1, 1), scale) if guided else None
    for numbers, inputs, captions in evaluation.held_out.conditions(options.samples):
        conditional = {**inputs.given, "guidance": torch.full((len(numbers),), scale)}
        unconditional = None if blank is None else _unconditional(blank, conditional, len(numbers))
        names = [(options.seed, number) for number in numbers]
        noise, sources = noises(names, tuple(inputs.clean.shape[1:]))
        pictures = draw_images(
            frozen, noise.to(evaluation.device), conditional, unconditional,
            steps=options.sample_steps, scale=scale, sampler=options.sampler, generators=sources,
            guided=options.guided_channels,
        )  # fmt: skip
        yield numbers, pictures, captions


def _unconditional(
    blank: Mapping[str, Tensor], conditional: Mapping[str, Tensor], count: int
) -> dict[str, Any]:
    """No condition for each of a batch, at the sizes of its pictures."""
    same = ("sizes", "guidance")
    repeated = {n: v.expand(count, *v.shape[1:]) for n, v in blank.items() if n not in same}
    return {**repeated, **{name: conditional[name] for name in same}}


def _precision(evaluation: Evaluation) -> AbstractContextManager[object]:
    chosen = evaluation.config.mixed_precision
    if chosen == "no":
        return nullcontext()
    return torch.autocast(evaluation.device.type, dtype=DTYPES[chosen])
