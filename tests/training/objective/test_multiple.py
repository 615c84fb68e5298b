"""Student's t test against scipy, and Holm's correction against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from training.objective.intervals import t_interval
from training.objective.multiple import holm, t_test


@pytest.mark.parametrize("count", [2, 5, 200])
def test_t_test_is_scipys_and_agrees_with_the_interval(count: int) -> None:
    source = torch.Generator().manual_seed(count)
    for shift in (0.0, 0.3, -2.0):
        values = torch.randn(count, generator=source) + shift
        expected = float(stats.ttest_1samp(values.double().numpy(), 0.0).pvalue)
        assert t_test(values) == pytest.approx(expected, rel=1e-9)
        assert t_test(values.tolist()) == t_test(-values)
        assert (t_test(values) < 0.05) == t_interval(values).excludes_zero


def test_equal_differences_are_certain() -> None:
    assert (t_test([0.5, 0.5]), t_test([0.0, 0.0, 0.0])) == (0.0, 1.0)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, float("nan")], [[1.0, 2.0], [3.0, 4.0]]])
def test_what_cannot_be_tested_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite differences"):
        t_test(wrong)


def test_holm_adjusts_step_by_step() -> None:
    found = holm({"d": 0.005, "a": 0.01, "b": 0.04, "c": 0.03})
    assert list(found) == ["d", "a", "b", "c"]
    # 4 x 0.005, 3 x 0.01, 2 x 0.03; the largest may not fall below the one before it.
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"one": 0.2}) == {"one": 0.2}
    assert holm({"x": 0.7, "y": 0.6}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\] for x, found"):
            holm({"x": wrong})
