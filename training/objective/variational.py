"""The variational term, for models that also predict the variance of the reverse process."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Posterior:
    """The true reverse process q(x_{t-1} | x_t, x_0) of a DDPM schedule, in float64.

    Args:
        betas: (T,).

    Source: Ho et al. 2020, eqs. 6-7.
    """

    def __init__(self, betas: Tensor) -> None:
        alphas = torch.cumprod(1 - betas, 0)
        before = torch.cat([betas.new_ones(1), alphas[:-1]])
        variance = betas * (1 - before) / (1 - alphas)
        self.log_betas = betas.log()
        # The first is 0, whose logarithm is not; improved diffusion takes the second for it.
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        self.of_clean = betas * before.sqrt() / (1 - alphas)
        self.of_noisy = (1 - before) * (1 - betas).sqrt() / (1 - alphas)

    def mean(self, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Mean (B, C, H, W) of x_{t-1} for x_0 and x_t."""
        return _at(self.of_clean, t) * clean + _at(self.of_noisy, t) * noisy


def variational_term(
    posterior: Posterior, clean: Tensor, predicted: Tensor, noisy: Tensor, sigma: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound for each value, in bits, (B, C, H, W), float64.

    Only the variance learns from it: the mean belongs to the squared error. The official DiT and
    DMP codes add it with weight 1 (LossType.MSE, learned range).

    Args:
        posterior: the true reverse process of the schedule.
        clean: x_0 (B, C, H, W).
        predicted: x_0 as the model has it; gradients stop here.
        noisy: x_t.
        sigma: the model's other channels (B, C, H, W): where between the smallest and the largest
            sensible log variance, from -1 to 1.
        t: (B,), int64.

    Source: Nichol and Dhariwal 2021, sections 3.1 and 3.3.
    """
    clean, predicted, noisy = clean.double(), predicted.detach().double(), noisy.double()
    share = (sigma.double() + 1) / 2
    log_variance = share * _at(posterior.log_betas, t) + (1 - share) * _at(
        posterior.log_variance, t
    )
    mean = posterior.mean(predicted, noisy, t)
    true_mean, true_log = posterior.mean(clean, noisy, t), _at(posterior.log_variance, t)
    divergence = 0.5 * (
        log_variance
        - true_log
        - 1
        + (true_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    # At t = 0 the bound is the likelihood of the data themselves.
    surprise = -_log_likelihood(clean, mean, 0.5 * log_variance)
    return torch.where((t == 0).reshape(-1, 1, 1, 1), surprise, divergence) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of x in [-1, 1] rounded to 256 levels, of a Gaussian, item by item.

    Source: Ho et al. 2020, eq. 13. On latents, which are not rounded, it is used all the same by
    the official codes.
    """
    scale = (-log_scale).exp()
    upper = torch.special.ndtr(scale * (x - mean + 1 / 255))
    lower = torch.special.ndtr(scale * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.to(t.device)[t].reshape(-1, 1, 1, 1)
