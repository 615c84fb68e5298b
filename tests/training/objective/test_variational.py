"""The variational term against the bound written out with torch's own distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.objective.variational import Posterior, variational_term


def reference_bound(betas: Tensor, clean: Tensor, means: Tensor, noisy: Tensor, share: Tensor,
                    t: int) -> float:  # fmt: skip
    """The term of Nichol and Dhariwal in plain scalars, with torch's own distributions."""
    alphas = torch.cumprod(1 - betas, 0)
    before = alphas[t - 1] if t else torch.tensor(1.0)
    small = (betas * (1 - torch.cat([torch.ones(1), alphas[:-1]])) / (1 - alphas))[max(t, 1)]
    variance = torch.exp(share * betas[t].log() + (1 - share) * small.log())

    def mean(x: Tensor) -> Tensor:
        return (
            before.sqrt() * betas[t] / (1 - alphas[t]) * x
            + (1 - betas[t]).sqrt() * (1 - before) / (1 - alphas[t]) * noisy
        )

    model = torch.distributions.Normal(mean(means), variance.sqrt())
    if t == 0:
        high, low = model.cdf(clean + 1 / 255), model.cdf(clean - 1 / 255)
        inside = torch.where(clean < -0.999, high, torch.where(clean > 0.999, 1 - low, high - low))
        return float(-inside.clamp(min=1e-12).log().mean() / math.log(2))
    true = torch.distributions.Normal(mean(clean), small.sqrt())
    return float(torch.distributions.kl_divergence(true, model).mean() / math.log(2))


def test_variational_term_is_the_bound() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000).double()
    draw = torch.Generator().manual_seed(3)
    clean = (torch.rand(4, 1, 4, 4, generator=draw) * 2 - 1).double()
    clean[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    noisy, wrong = torch.randn(2, 4, 1, 4, 4, generator=draw).double()
    means, sigma = clean + 0.05 * wrong, torch.rand(4, 1, 4, 4, generator=draw).double() * 2 - 1
    t = torch.tensor([0, 1, 400, 999])
    ours = variational_term(Posterior(betas), clean, means, noisy, sigma, t).flatten(1).mean(1)
    expected = [
        reference_bound(betas, clean[n], means[n], noisy[n], (sigma[n] + 1) / 2, int(t[n]))
        for n in range(4)
    ]
    assert ours.tolist() == pytest.approx(expected, rel=1e-4)


def test_variational_term_teaches_the_variance_alone() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    means = torch.zeros(2, 1, 2, 2, requires_grad=True)
    sigma = torch.zeros(2, 1, 2, 2, requires_grad=True)
    x = torch.ones(2, 1, 2, 2) / 2
    variational_term(Posterior(betas), x, means, x, sigma, torch.tensor([5, 900])).sum().backward()
    assert means.grad is None
    assert bool(sigma.grad.any())
