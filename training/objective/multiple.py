"""Significance of paired differences, and its correction for several comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from scipy.special import stdtr
from torch import Tensor


def t_test(differences: Tensor | Sequence[float]) -> float:
    """The two-sided p-value of Student's t test that the mean of differences is 0.

    It belongs to `t_interval`: p is below 0.05 exactly where that interval excludes 0.

    Args:
        differences: (n,), one for each pair, such as a training's seed.

    Raises:
        ValueError: there are fewer than two, or values that are not finite.
    """
    values = torch.as_tensor(differences, dtype=torch.double)
    if values.ndim != 1 or len(values) < 2 or not bool(values.isfinite().all()):
        raise ValueError(
            f"expected at least two finite differences (n,), found shape {tuple(values.shape)}"
            f"{'' if bool(values.isfinite().all()) else ' with NaN or infinity'}"
        )
    mean, deviation = float(values.mean()), float(values.std())
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / (deviation / math.sqrt(len(values)))
    return float(2 * stdtr(len(values) - 1, -abs(t)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of several comparisons, adjusted so that each may be held against one level.

    If all comparisons whose adjusted value is below 0.05 are called different, the chance that
    even one of them is called so wrongly is at most 0.05, however the comparisons depend on each
    other.

    Args:
        p_values: by the name of the comparison.

    Returns:
        Adjusted values by the same names, in the same order.

    Raises:
        ValueError: a value that is not in [0, 1].

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    for name, value in p_values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"expected a p-value in [0, 1] for {name}, found {value}")
    least, adjusted = 0.0, {}
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}
