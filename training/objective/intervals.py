"""95 % intervals of a mean difference, from values that belong together in pairs.

The verdict of a training run and the evaluation use the same interval, so that they agree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.special import stdtrit
from torch import Tensor

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean difference with the ends of its interval; unpacks as (mean, low, high)."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def t_quantile(degrees: float) -> float:
    """The factor on the standard error that makes an interval of `LEVEL`, from Student's t."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def t_interval(differences: Tensor) -> Interval:
    """Mean of paired differences (n,) and its interval from Student's t.

    Raises:
        ValueError: there are fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"expected at least two differences for an interval, found {n}")
    values = differences.double()
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(n)
    half = t_quantile(n - 1) * error
    return Interval(mean, mean - half, mean + half)


def paired_interval(base: Tensor, other: Tensor) -> Interval:
    """Interval of mean(other - base) over images that both models saw with equal noise.

    Args:
        base: one value of each image (images,), such as its loss under the base.
        other: values of the other model (images,), in the same order.

    Raises:
        ValueError: the shapes differ, are not (images,), or there are fewer than two images.
    """
    if base.ndim != 1 or base.shape != other.shape:
        raise ValueError(
            "expected one value of each image from both models, found shapes "
            f"{tuple(base.shape)} and {tuple(other.shape)}"
        )
    return t_interval(other.double() - base.double())


def ratio_interval(base: Tensor, other: Tensor) -> Interval:
    """Interval of mean(other) / mean(base) - 1 over images that both models saw with equal noise.

    It is that of the ratio itself (the delta method): where both losses of an image rise and fall
    together, as those of a gap and of what is left of it do, it is narrower than that of the
    difference over the mean of the base.

    Args:
        base, other: see `paired_interval`.

    Returns:
        Zeros where the base has no loss.
    """
    plain, scale = paired_interval(base, other), float(base.double().mean())
    if scale <= 0:
        return Interval(0.0, 0.0, 0.0)
    ratio = float(other.double().mean()) / scale
    spread = t_interval((other.double() - ratio * base.double()) / scale)
    mean = plain.mean / scale
    return Interval(mean, mean + spread.low - spread.mean, mean + spread.high - spread.mean)
