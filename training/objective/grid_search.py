"""A number chosen from a grid that grows: a choice at the edge of a grid says little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Args:
        best: the value with the smallest measure.
        tried: the measure of every value that was tried, in the order of the values.
        inside: whether smaller and larger values than the best were tried.
    """

    best: float
    tried: dict[float, float]
    inside: bool


def best_inside(
    measure: Callable[[float], float], values: Sequence[float], growth: int = 10
) -> Choice:
    """The value with the smallest measure, of a grid that grows while its edge is the best.

    A grid grows by the ratio of its two outermost values, so that it suits learning rates, and
    numbers near 1. New values are rounded to four digits.

    Args:
        measure: smaller is better; it is asked once for each value.
        values: at least two different positive numbers.
        growth: how many values are added at most.

    Raises:
        ValueError: fewer than two values, or some that are not positive.

    >>> best_inside(lambda rate: abs(rate - 5), [1, 2]).best
    4.0
    """
    grid = sorted({float(value) for value in values})
    if len(grid) < 2 or grid[0] <= 0:
        raise ValueError(f"expected two different positive values at least, found {values}")
    tried = {value: measure(value) for value in grid}
    for _ in range(growth):
        best = min(grid, key=lambda value: tried[value])
        if best not in (grid[0], grid[-1]):
            break
        neighbour = grid[1] if best == grid[0] else grid[-2]
        new = float(f"{best * best / neighbour:.4g}")
        if new in tried:
            break  # rounding leaves no room
        tried[new] = measure(new)
        grid = sorted(tried)
    best = min(grid, key=lambda value: tried[value])
    inside = best not in (grid[0], grid[-1])
    return Choice(best, {value: tried[value] for value in grid}, inside)
