"""Differences between models with 95 % intervals, from what both saw alike.

Every interval says what it is over. Over images: held-out images, on equal noise. Over samples:
generated images from equal noise, drawn again with replacement, the same rows in both models. Over
seeds: trainings. The first two say whether this patch differs from that model; only the last says
whether its training, repeated, would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.special import stdtr
from torch import Tensor

from training.evaluation.features import Features
from training.evaluation.metrics import Reference
from training.objective.intervals import LEVEL, Interval, t_interval, t_quantile
from training.objective.multiple import t_test


@dataclass(frozen=True)
class Difference:
    """model - against, of one measure.

    Args:
        mean: the mean difference.
        low, high: the ends of its 95 % interval.
        n: the number of images, samples or seeds.
        over: images, samples or seeds.
    """

    model: str
    against: str
    measure: str
    mean: float
    low: float
    high: float
    n: int
    over: str

    def to_json(self) -> dict[str, Any]:
        """The difference as evaluation.json has it."""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return Interval(self.mean, self.low, self.high).excludes_zero


def welch_interval(a: Tensor, b: Tensor) -> Interval:
    """mean(a) - mean(b) of independent values (n,) and (m,), and Welch's interval.

    Raises:
        ValueError: fewer than two of either.
    """
    mean, error, degrees = _welch(a, b)
    half = t_quantile(degrees) * error
    return Interval(mean, mean - half, mean + half)


def welch_test(a: Tensor, b: Tensor) -> float:
    """The two-sided p-value of Welch's test that independent values (n,) and (m,) have one mean.

    Raises:
        ValueError: fewer than two of either.
    """
    mean, error, degrees = _welch(a, b)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(degrees, -abs(mean / error)))


def _welch(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """The difference of the means, its standard error, and the degrees of freedom."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected two values of each at least, found {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    mean = float(a.mean() - b.mean())
    parts = [float(x.var()) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        return mean, 0.0, 1.0
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    return mean, math.sqrt(sum(parts)), degrees


def over_seeds(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """The difference of two trainings repeated with other seeds.

    Against one value: t interval of a - b. Both repeated: Welch's, because seeds of different
    methods are not pairs. None where a is not repeated.
    """
    first, second = torch.tensor(a, dtype=torch.double), torch.tensor(b, dtype=torch.double)
    if len(first) < 2:
        return None
    if len(second) == 1:
        return t_interval(first - second)
    return welch_interval(first, second)


def p_over_seeds(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The p-value that belongs to `over_seeds`; None where a is not repeated."""
    first, second = torch.tensor(a, dtype=torch.double), torch.tensor(b, dtype=torch.double)
    if len(first) < 2:
        return None
    return t_test(first - second) if len(second) == 1 else welch_test(first, second)


def resamples(count: int, draws: int, seed: int) -> Tensor:
    """Rows to draw again, (draws, count): the same for every model that is compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (draws, count), generator=generator)


def bootstrap(features: Features, reference: Reference, rows: Tensor) -> dict[str, Tensor]:
    """FID, sFID and KID of samples drawn again: (draws,) each.

    Args:
        features: of N samples.
        rows: (draws, N), from `resamples`.
    """
    found = {}
    if reference.pooled is not None:
        pooled = features.pooled.double()
        values = [reference.pooled.distance(pooled[chosen]) for chosen in rows]
        found["fid"] = torch.tensor(values, dtype=torch.double)
    if reference.spatial is not None and features.spatial is not None:
        spatial = features.spatial.double()
        values = [reference.spatial.distance(spatial[chosen]) for chosen in rows]
        found["sfid"] = torch.tensor(values, dtype=torch.double)
    if "kid" in reference.wanted:
        found["kid"] = _kernel_distances(features.pooled, reference.features.pooled, rows)
    return found


def _kernel_distances(generated: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
    """KID of all samples but for the reference's own term, which a difference does not have.

    A sample drawn twice is no pair of samples, or its distance 0 to itself would count as
    closeness: pairs of the same row are left out.
    """
    x, y = generated.double(), reference.double()
    count = len(x)
    weights = torch.stack([torch.bincount(chosen, minlength=count) for chosen in rows]).double()
    pairs, crossed = torch.zeros(len(rows)).double(), torch.zeros(len(rows)).double()
    for part in torch.arange(count).split(1024):
        own = _kernel(x[part], x)
        own[torch.arange(len(part)), part] = 0
        pairs += (weights[:, part] @ own * weights).sum(1)
        crossed += weights[:, part] @ _kernel(x[part], y).mean(1)
    different = weights.sum(1) ** 2 - weights.square().sum(1)
    return pairs / different - 2 * crossed / weights.sum(1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """KID's: cubic, of width F."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def bootstrap_interval(difference: float, drawn: Tensor) -> Interval:
    """The interval of a difference from its values (draws,) on samples drawn again.

    Percentiles around the difference: drawing with replacement makes any set poorer than it is,
    which moves all values, and is taken off.
    """
    tail = (1 - LEVEL) / 2
    around = drawn - drawn.mean()
    low, high = torch.quantile(around, torch.tensor([tail, 1 - tail]).double()).tolist()
    return Interval(difference, difference + low, difference + high)
