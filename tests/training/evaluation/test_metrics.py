"""Metrics and intervals against numpy, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

from training.evaluation.comparison import (
    bootstrap,
    bootstrap_interval,
    over_seeds,
    resamples,
    welch_interval,
)
from training.evaluation.features import Features, spatial_features
from training.evaluation.metrics import Reference, kid, within
from training.objective.frechet import fid, sfid
from training.objective.intervals import t_interval


def drawn(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + shift


def with_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The definition with a matrix square root, as reference implementations have it."""
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(c_a @ c_b)
    distance = np.square(a.mean(0) - b.mean(0)).sum()
    return float(distance + np.trace(c_a + c_b - 2 * np.real(root)))


@pytest.mark.parametrize("count", [200, 12])  # more samples than features, and fewer
def test_distances_are_those_of_scipy(count: int) -> None:
    a, b = drawn(300, 16, 1).double(), drawn(count, 16, 2, 0.5).double()
    expected = with_scipy(a.numpy(), b.numpy())
    assert fid(b, a) == pytest.approx(expected, rel=1e-6)
    assert sfid(b, a) == pytest.approx(expected, rel=1e-6)


def test_spatial_features_are_the_first_seven_channels() -> None:
    feature_map = torch.randn(2, 192, 17, 17)
    found = spatial_features(feature_map)
    assert found.shape == (2, 2023)
    assert torch.equal(found, feature_map[:, :7].reshape(2, -1))


def unbiased_kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID of whole sets, pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    own = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
    other = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
    crossed = sum(kernel(a, b) for a in x for b in y)
    return own / (n * (n - 1)) + other / (m * (m - 1)) - 2 * crossed / (n * m)


def test_kid_of_whole_sets_is_the_unbiased_estimate() -> None:
    x, y = drawn(15, 4, 1).double(), drawn(15, 4, 2).double()
    before = torch.get_rng_state()
    mean, std = kid(x, y, subsets=3, subset_size=15)
    assert mean == pytest.approx(unbiased_kernel_distance(x, y), rel=1e-6)
    assert std == pytest.approx(0, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), before)
    assert kid(x, y, 3, 10, seed=1) == kid(x, y, 3, 10, seed=1) != kid(x, y, 3, 10, seed=2)


def test_bootstrap_of_kid_leaves_out_pairs_of_one_sample() -> None:
    x, y = drawn(12, 4, 1), drawn(20, 4, 2)
    reference = Reference(Features(y), ["kid", "fid"], 12, subsets=2, subset_size=12)
    whole = torch.arange(12).unsqueeze(0)
    doubled = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]])
    rows = torch.cat([whole, doubled])
    found = bootstrap(Features(x), reference, rows)
    # The terms of the reference alone, which a difference does not have, are the same in both.
    terms = [
        unbiased_kernel_distance(z.double(), y.double()) - float(value)
        for z, value in zip((x, x[:6]), found["kid"], strict=True)
    ]
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)
    assert found["fid"][0] == pytest.approx(fid(x, y))
    assert found["fid"][1] == pytest.approx(fid(x[doubled[0]], y))


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0], [101.0], [102.0], [103.0]])
    near = torch.tensor([[0.5], [1.5], [2.5], [1.2], [1.1]])
    reference = Reference(Features(real), ["precision", "recall"], 5)
    found = reference.measure(Features(near))
    assert found.values["precision"] == 1.0
    assert found.values["recall"] == 0.5  # half of what is real is out of reach
    assert found.single["recall"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    far = reference.measure(Features(near + 500))
    assert far.values == {"precision": 0.0, "recall": 0.0}


def test_manifolds_are_those_of_brute_force() -> None:
    a, b = drawn(20, 3, 1), drawn(30, 3, 2)
    expected = []
    for point in a:
        inside = False
        for centre in b:
            distances = sorted(float((centre - other).norm()) for other in b)
            inside |= float((centre - point).norm()) <= distances[3]  # the first is itself
        expected.append(inside)
    assert within(a, b).tolist() == expected
    assert 0 < sum(expected) < 20


def test_what_cannot_be_computed_is_said() -> None:
    reference = Reference(Features(drawn(30, 4, 1)), ["fid", "sfid", "kid", "precision"], 3)
    assert set(reference.impossible) == {"sfid", "kid", "precision"}
    assert "found 3" in reference.impossible["kid"]
    assert "no feature map" in reference.impossible["sfid"]
    assert set(reference.measure(Features(drawn(3, 4, 2))).values) == {"fid"}


def test_welch_interval_is_that_of_scipy() -> None:
    a, b = drawn(20, 1, 1)[:, 0].double(), drawn(9, 1, 2, 0.3)[:, 0].double()
    expected = stats.ttest_ind(a.numpy(), b.numpy(), equal_var=False).confidence_interval(0.95)
    mean, low, high = welch_interval(a, b)
    assert (low, high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert over_seeds(a.tolist(), b.tolist()) == pytest.approx((mean, low, high))
    assert over_seeds(a.tolist(), [0.0]) == pytest.approx(t_interval(a))
    assert over_seeds([1.0], [2.0]) is None


def test_interval_of_samples_covers_a_real_difference_and_no_other() -> None:
    """Two sets of one shape, from equal noise: a shift is seen, noise alone is not."""
    reference = Reference(Features(drawn(400, 3, 5)), ["fid"], 200)
    noise = drawn(200, 3, 5)
    rows = resamples(200, 60, seed=0)
    plain = bootstrap(Features(noise), reference, rows)["fid"]

    def interval(other: Tensor) -> tuple[float, float, float]:
        shift = bootstrap(Features(other), reference, rows)["fid"]
        values = [reference.measure(Features(x)).values["fid"] for x in (other, noise)]
        return bootstrap_interval(values[0] - values[1], shift - plain)

    mean, low, high = interval(noise + 1)
    assert 0 < low < mean < high
    jitter = torch.randn(noise.shape, generator=torch.Generator().manual_seed(9)) * 1e-3
    mean, low, high = interval(noise + jitter)
    assert low < 0 < high
    assert high - low < 0.05  # paired: far narrower than the measure's own spread
    assert interval(noise) == (0, 0, 0)
