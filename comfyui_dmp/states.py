"""Noisy latents with the exact predictions there, kept on the CPU until the cheap model trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.bases.schedule import inside

_PART = 8  # One part in so many of all drawings is held back,
_HELD = 64  # and at most so many states of it are looked at.


@dataclass(frozen=True)
class States:
    """States that the exact model passed through while it drew pictures.

    Args:
        noisy: latents (N, C, ..., h, w), float32.
        sigmas: their noise levels (N,), as ComfyUI has them.
        t: their timesteps (N,), on the scale 0..1000.
        target: what the exact call predicts there, like `noisy`.
        condition: number of the conditioning of each state (N,).
        strengths: at which strength of the patch each state is predicted (N,); None where all
            are 1.
    """

    noisy: Tensor
    sigmas: Tensor
    t: Tensor
    target: Tensor
    condition: Tensor
    strengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.noisy)

    def at(self, rows: Tensor) -> States:
        """Returns some of the states, by their numbers."""
        return self._each(lambda value: value[rows])

    def within(self, timesteps: tuple[int, int]) -> States:
        """Returns the states at the timesteps that a patch acts at."""
        return self.at(inside(self.t, timesteps).nonzero().flatten())

    def to(self, device: torch.device) -> States:
        """Returns the states on a device."""
        return self._each(lambda value: value.to(device))

    def by_condition(self) -> Iterator[tuple[int, States]]:
        """Goes through the conditionings and the states of each."""
        for number in self.condition.unique().tolist():
            yield number, self.at((self.condition == number).nonzero().flatten())

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """Returns the states of all parts.

        Raises:
            PatchError: there are none.
        """
        if not parts:
            raise PatchError(
                "expected states of the exact model to train on, found none: draw one picture or "
                "more."
            )
        values: dict[str, Any] = {}
        for field in fields(cls):
            own = [getattr(part, field.name) for part in parts]
            values[field.name] = None if own[0] is None else torch.cat(own)
        return cls(**values)

    def _each(self, change: Any) -> States:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **changed)


def held_back(runs: Sequence[States], seed: int) -> tuple[States, States]:
    """Parts the states in those that are trained on and those that show what was learned.

    Of eight drawings or more each eighth one is held back with all its pictures, of fewer an
    eighth of all states. So few states that nothing can be spared serve both ends.

    Args:
        runs: the states of each drawing.
        seed: of the choice.

    Returns:
        The states to train on, and at most `_HELD` others.

    Raises:
        PatchError: there are none.
    """
    source = torch.Generator().manual_seed(seed)
    whole = States.joined(runs)
    if len(whole) < _PART:
        return whole, whole
    if len(runs) < _PART:
        order = torch.randperm(len(whole), generator=source)
        trained, held = whole.at(order[len(whole) // _PART :]), order[: len(whole) // _PART]
        return trained, whole.at(held[:_HELD])
    trained = States.joined([run for n, run in enumerate(runs, start=1) if n % _PART])
    held_runs = States.joined(runs[_PART - 1 :: _PART])
    return trained, held_runs.at(torch.randperm(len(held_runs), generator=source)[:_HELD])


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yields the numbers of states for each step (size,), in a new random order in each epoch.

    The last batch of an epoch is filled up from the beginning of its order.

    Args:
        count: the number of states.
        size: states of a step.
        seed: of the order.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=source)
        for start in range(0, count, size):
            chosen = torch.arange(start, start + size) % count
            yield order[chosen]
