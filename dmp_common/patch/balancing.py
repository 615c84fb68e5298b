"""Balancing losses that keep a gate from always choosing the same prompts.

Axes are (T, S, N) everywhere: timesteps, sites, prompts. The gate depends on the timestep only, so
both losses are computed at timesteps spread over the whole schedule (`stratified_timesteps`), not
at those of a batch: in a batch of one, a perfectly balanced, specialised gate looks unbalanced.

We follow the paper and Shazeer et al. (2017), where the sum over inputs comes before the squared
coefficient of variation. The official DMP code sums over depth instead, which punishes gates that
specialise by timestep and misses dead prompts; its load term counts gates below zero and is
therefore always 0.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def stratified_timesteps(
    count: int,
    last: float = 999.0,
    generator: torch.Generator | None = None,
    *,
    first: float = 0.0,
) -> Tensor:
    """Draws a timestep from each of `count` equal parts of [first, last]: (T,), float32, CPU."""
    jitter = torch.rand(count, generator=generator)
    return first + (torch.arange(count) + jitter) * ((last - first) / count)


def importance_loss(weights: Tensor) -> Tensor:
    """Measures how unequally the prompts of a site are used over all timesteps.

    I[s, j] = sum_t w[t, s, j]; the loss is the mean over s of CV^2 over j.

    Args:
        weights: gate weights (T, S, N).

    Returns:
        A scalar, 0 where every prompt gets the same total weight.

    Source: Shazeer et al. 2017, eqs. 6-7.
    """
    return _squared_cv(weights.float().sum(0)).mean()


def load_loss(
    logits: Tensor, noise_std: Tensor, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """Measures how unequally often the prompts are expected among a site's top k under noise.

    P[t, s, j] is the probability that j is among the top k when its own noise is drawn again and
    all other noise stays. Noise and k serve this estimate only: the forward pass is noiseless and
    uses all prompts.

    Args:
        logits: gate logits (T, S, N).
        noise_std: standard deviation of the noise (T, 1, N), positive.
        k: how many prompts count as chosen, below N.
        generator: the random generator of the noise.

    Returns:
        A scalar: mean over s of CV^2 over j of sum_t P[t, s, j].

    Raises:
        ValueError: k is not from 1 to N-1, so that the load would be constant.

    Source: Shazeer et al. 2017, eqs. 8-11.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(
            f"expected k from 1 to N-1 = {logits.shape[-1] - 1}, found {k}: every prompt would "
            "be chosen always."
        )
    logits = logits.float()
    noise = torch.randn(logits.shape, generator=generator, device=logits.device)
    noisy = logits + noise * noise_std.float()
    top = noisy.topk(k + 1, dim=-1).values
    inside, outside = top[..., k, None], top[..., k - 1, None]  # (k+1)-th and k-th largest
    threshold = torch.where(noisy > inside, inside, outside)
    chance = torch.special.ndtr((logits - threshold) / noise_std.float())
    return _squared_cv(chance.sum(0)).mean()


class GateNoise(nn.Module):
    """The size of the load loss's noise, softplus(e W_noise) + 1e-2. Only training needs it.

    It is never saved in a patch file.

    Args:
        embedding: the size E of the time embedding.
        count: the number of prompts of a site, N (times K).

    Source: Shazeer et al. 2017, eq. 4.
    """

    def __init__(self, embedding: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(embedding, count))

    def forward(self, e: Tensor) -> Tensor:
        """Computes the standard deviation (T, 1, N) of the noise for a time embedding (T, E)."""
        return (F.softplus(e.float() @ self.weight.float()) + 1e-2).unsqueeze(1)


def _squared_cv(totals: Tensor) -> Tensor:
    """Computes CV^2 over the last axis, with the population variance."""
    mean = totals.mean(-1)
    return totals.var(-1, unbiased=False) / (mean.square() + 1e-10)
