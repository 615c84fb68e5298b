"""Says where along the timesteps a patch acts, and how strongly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmp_common.errors import PatchError

LAST = 1000.0  # timesteps run from 1000 (noise) to 0 (picture) for every base


def linear_percent(percent: float) -> float:
    """Returns the timestep of a progress (0 = noise, 1 = picture), by the plain rule."""
    return (1.0 - percent) * LAST


@dataclass(frozen=True)
class Schedule:
    """Limits a patch to a range of timesteps, with a curve over it, for any number of steps.

    Args:
        first: the timestep at which the patch begins to act (high, noisy).
        last: the timestep at which it stops (low); both ends are included.
        curve: (timestep, factor) points, interpolated linearly and held beyond the ends; empty
            means 1 everywhere. Two points at one timestep are a step, from the first to the second
            as timesteps rise.

    Raises:
        PatchError: the range ends before it starts, or a point is not finite.
    """

    first: float = math.inf
    last: float = -math.inf
    curve: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.first >= self.last:
            raise PatchError(
                f"expected a schedule that starts before it ends, found timesteps {self.first} to "
                f"{self.last}: a patch runs from noise (high) to picture (low)."
            )
        if not all(math.isfinite(value) for point in self.curve for value in point):
            raise PatchError(f"expected finite points of a curve, found {self.curve}: correct it.")
        # The sort is stable: of two points at one timestep, the first applies below it.
        curve = sorted(self.curve, key=lambda point: point[0])
        object.__setattr__(self, "curve", tuple(curve))

    @classmethod
    def from_percent(
        cls,
        start: float = 0.0,
        end: float = 1.0,
        curve: Sequence[tuple[float, float]] = (),
        to_timestep: Callable[[float], float] = linear_percent,
    ) -> Schedule:
        """Makes a schedule from progress, 0 at the noise and 1 at the picture.

        Args:
            start, end: the patch acts between these points of progress. 0 and 1 mean from the very
                beginning to the very end, whatever the rule gives.
            curve: (progress, factor) points.
            to_timestep: the host's own rule from progress to a timestep.

        Raises:
            PatchError: a progress is not from 0 to 1, or the schedule ends before it starts.
        """
        for percent in (start, end, *(point[0] for point in curve)):
            if not 0.0 <= percent <= 1.0:
                raise PatchError(f"expected a progress from 0 to 1, found {percent}: correct it.")
        if start > end:
            raise PatchError(
                f"expected start <= end of a schedule, found {start} and {end}: swap them."
            )
        # Reversed, because timesteps rise as progress falls. Of two points at one progress, the one
        # that was given first applies on the noisier side.
        points = sorted(curve, key=lambda point: point[0])[::-1]
        return cls(
            first=math.inf if start <= 0.0 else to_timestep(start),
            last=-math.inf if end >= 1.0 else to_timestep(end),
            curve=tuple((to_timestep(percent), factor) for percent, factor in points),
        )

    @property
    def always(self) -> bool:
        """Tells whether the patch acts everywhere with factor 1."""
        return not self.curve and self.first == math.inf and self.last == -math.inf

    def factors(self, timesteps: Tensor) -> Tensor:
        """Returns the factors of the strength, which are 0 outside the range.

        Args:
            timesteps: any shape, on the scale 0..1000.

        Returns:
            The factors, float64, in the shape of `timesteps`.

        >>> Schedule.from_percent(0.0, 0.5).factors(torch.tensor([600.0, 400.0])).tolist()
        [1.0, 0.0]
        >>> fade = Schedule.from_percent(curve=[(0.0, 1.0), (1.0, 0.0)])
        >>> fade.factors(torch.tensor([1000.0, 250.0, 0.0])).tolist()
        [1.0, 0.25, 0.0]
        """
        t = timesteps.double()
        factors = torch.full_like(t, self.curve[0][1] if self.curve else 1.0)
        for (low, before), (high, after) in itertools.pairwise(self.curve):
            if high > low:
                factors = factors + (after - before) * ((t - low) / (high - low)).clamp(0.0, 1.0)
            else:  # two points at one timestep are a step
                factors = factors + (after - before) * (t >= high)
        return torch.where((t >= self.last) & (t <= self.first), factors, 0.0)


ALWAYS = Schedule()  # everywhere, with factor 1
EVERYWHERE = (0, 1000)  # the timesteps of a patch that is not limited to a part of them


def inside(timesteps: Tensor, within: tuple[int, int]) -> Tensor:
    """Returns a mask of the timesteps that a patch acts at: from the first to below the second.

    Args:
        timesteps: any shape, on the scale 0..1000.
        within: see `Variant.timesteps`; 1000 belongs to a patch that reaches to the end.

    >>> inside(torch.tensor([499.5, 500.0, 1000.0]), (0, 500)).tolist()
    [True, False, False]
    >>> inside(torch.tensor([499.5, 500.0, 1000.0]), (500, 1000)).tolist()
    [False, True, True]
    """
    low, high = within
    below_end = timesteps < high if high < EVERYWHERE[1] else torch.ones_like(timesteps).bool()
    return (timesteps >= low) & below_end
