"""Weights that make the loss relative: at every noise level a share of what the base itself loses.

The squared error of a converged base differs by a factor of a thousand between timesteps, so the
plain mean is nearly all about the least noisy ones. Divided by the base's own loss there, an
improvement by one per cent counts alike everywhere; and as the base's loss is the variance of what
is left to explain, these are also the weights of least squares with unequal variances (Aitken
1935), which make the most of few samples. Ours, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmp_common.patch.objectives import level_weights

BINS = 20


class RelativeWeights:
    """Weights of timesteps: the base's mean loss over its loss there.

    So the weighted loss of the base itself is its mean loss at every timestep.

    Args:
        losses: the base's, in equal ranges of timesteps (bins,), least noisy first, positive.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, losses: Tensor) -> None:
        if losses.ndim != 1 or not (losses.isfinite() & (losses > 0)).all():
            raise ValueError(f"expected positive losses by range of timesteps, found {losses}")
        self.logs = level_weights(losses).log()

    def __call__(self, t: Tensor) -> Tensor:
        """(B,) float32 at timesteps t (B,) on the scale 0..1000; linear in the logarithm."""
        bins = len(self.logs)
        logs = self.logs.to(t.device, torch.float32)
        place = (t.float() * bins / 1000 - 0.5).clamp(0, bins - 1)
        low = place.floor().long().clamp(max=max(bins - 2, 0))
        high = (low + 1).clamp(max=bins - 1)
        return torch.lerp(logs[low], logs[high], place - low).exp()


def level_means(t: Tensor, values: Tensor, bins: int = BINS) -> Tensor:
    """Mean values in equal ranges of timesteps (bins,), float64; 0 where a range has no timestep.

    Args:
        t: (N,), on the scale 0..1000.
        values: (N,).

    >>> level_means(torch.tensor([100.0, 200.0, 900.0]), torch.tensor([1.0, 3.0, 5.0]), bins=2)
    tensor([2., 5.], dtype=torch.float64)
    """
    places = (t.float() * bins / 1000).long().clamp(max=bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, values.double())
    counts = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, places, torch.ones_like(values, dtype=torch.float64)
    )
    return sums / counts.clamp(min=1)


def gap_weights(gaps: Tensor) -> RelativeWeights:
    """Weights with which the gap of a cheap call counts alike at every noise level.

    Args:
        gaps: mean gaps in equal ranges of timesteps (bins,), least noisy first. A gap of 0, as
            outside of an interval of guidance, gets the mean of the others.
    """
    positive = gaps > 0
    if not bool(positive.any()):
        return RelativeWeights(torch.ones_like(gaps))
    return RelativeWeights(torch.where(positive, gaps, gaps[positive].mean()))
