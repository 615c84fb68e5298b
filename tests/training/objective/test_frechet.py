"""Frechet distances against closed forms."""

import math

import pytest
import torch

from training.objective.frechet import frechet_distance


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 200) -> torch.Tensor:
    """Samples whose empirical mean and unbiased covariance are exactly the ones given."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    empirical = torch.linalg.cholesky(x.T @ x / (count - 1))
    white = torch.linalg.solve_triangular(empirical, x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_commuting_gaussians():
    # Commuting covariances: |mu_a - mu_b|^2 + sum over axes of (sd_a - sd_b)^2, in any basis.
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    mean_a, mean_b = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 4.0]], dtype=torch.float64)
    sd_a, sd_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 0.5]], dtype=torch.float64)
    a = gaussian(mean_a, basis @ sd_a.square().diag() @ basis.T)
    b = gaussian(mean_b, basis @ sd_b.square().diag() @ basis.T)
    assert frechet_distance(a, b) == pytest.approx((4 + 1) + (4 + 1 + 0), abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = C_a C_b.
    zero = torch.zeros(2, dtype=torch.float64)
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected)


def test_frechet_of_equal_sets_is_zero_even_when_singular():
    few = torch.randn(5, 64)  # rank 4 in 64 dimensions
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, few + 1) == pytest.approx(64, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least 2 samples in features_a, found 1"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "one width, found 4 and 3"),
        (torch.zeros(5, 4), torch.zeros(5), r"features_b as \(samples, F\)"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.nan), "finite values in features_b"),
        (torch.full((5, 4), torch.inf), torch.zeros(5, 4), "finite values in features_a"),
    ],
)
def test_frechet_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
