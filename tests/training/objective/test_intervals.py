"""Intervals of paired differences against scipy."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from training.objective.intervals import paired_interval, t_interval


def losses(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [2, 7, 500])
def test_interval_is_that_of_a_paired_t_test(count: int) -> None:
    base, other = losses(count, 1), losses(count, 2)
    expected = stats.ttest_rel(other.double().numpy(), base.double().numpy())
    ends = expected.confidence_interval(0.95)
    found = paired_interval(base, other)
    assert found.mean == pytest.approx(float((other.double() - base.double()).mean()))
    assert (found.low, found.high) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert found == t_interval(other.double() - base.double())


def test_pairs_make_a_small_change_certain() -> None:
    """Images differ far more between themselves than one image does between two models."""
    base = losses(100, 1)
    better = paired_interval(base, base * 0.99)
    assert better.mean < 0 and better.high < 0 and better.excludes_zero
    noise = 1e-3 * (losses(100, 3) - 0.5)
    assert not paired_interval(base, base + noise - noise.mean()).excludes_zero


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two differences"):
        paired_interval(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"found shapes \(3,\) and \(4,\)"):
        paired_interval(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="one value of each image"):
        paired_interval(torch.ones(3, 2), torch.ones(3, 2))
