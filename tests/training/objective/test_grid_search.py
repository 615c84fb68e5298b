"""A choice lies inside its grid, or the grid grows."""

from __future__ import annotations

import pytest

from training.objective.grid_search import best_inside


def test_a_grid_grows_where_its_edge_is_best() -> None:
    asked: list[float] = []

    def measure(value: float) -> float:
        asked.append(value)
        return abs(value - 1.045)

    found = best_inside(measure, [1.01, 0.99, 1.0])
    assert found.best == pytest.approx(1.04) and found.inside
    assert list(found.tried) == sorted(asked) and len(asked) == len(set(asked))
    assert max(asked) == pytest.approx(1.05)
    # A choice inside asks for nothing more; downwards the grid grows too.
    assert list(best_inside(lambda value: abs(value - 2), [1, 2, 3]).tried) == [1, 2, 3]
    rates = best_inside(lambda rate: abs(rate - 1e-5), [3e-4, 1e-3])
    assert rates.inside and rates.best == pytest.approx(8.1e-6)


def test_an_end_that_is_not_found_is_told() -> None:
    found = best_inside(lambda value: -value, [1, 2], growth=3)
    assert (found.best, found.inside, list(found.tried)) == (16, False, [1, 2, 4, 8, 16])
    for wrong in ([1.0], [0.0, 1.0], [2.0, 2.0]):
        with pytest.raises(ValueError, match="two different positive values"):
            best_inside(abs, wrong)
