"""Weights that make the loss relative: at every noise level a share of what the base itself loses.

The squared error of a converged base differs by a factor of a thousand between timesteps, so the
plain mean is nearly all about the least noisy ones. Divided by the base's own loss there, an
improvement by one per cent counts alike everywhere; and as the base's loss is the variance of what
is left to explain, these are also the weights of least squares with unequal variances (Aitken
1935), which make the most of few samples. Ours, not in the paper.

Rounding counts as loss: under bfloat16 autocast a small DiT in pixels is off by 4.5e-5 (mean
square; docs/RESULTS.md). Where a base loses no more than that, train in full precision.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dmp_common.patch.objectives import level_weights
from training.options.config import TrainConfig

BINS = 20
IMAGES = 256
# Four times that mean square; float16 has three more bits.
_ROUNDED = {"bf16": 2e-4, "fp16": 3e-6}


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


def warn_of_rounding(losses: Tensor, precision: str) -> None:
    """Warns where the base loses hardly more than half precision rounds away.

    Args:
        losses: the base's, in ranges of timesteps (bins,), least noisy first.
        precision: the value of --mixed_precision.
    """
    limit, least = _ROUNDED.get(precision, 0.0), float(losses.min())
    if least < limit:
        warnings.warn(
            f"--relative_loss expects losses above {limit:g} with --mixed_precision {precision}, "
            f"found {least:.2g} at the noisiest timesteps: part of that is rounding, and the patch "
            "would be trained on it. Use --mixed_precision no.",
            stacklevel=2,
        )


def relative_config(config: TrainConfig) -> TrainConfig:
    """The configuration with which those losses are measured: `BINS` ranges, `IMAGES` images and
    one draw of each image and range."""
    return config.model_copy(
        update={
            "validation_bins": BINS,
            "validation_draws": 1,
            "max_validation_images": IMAGES,
        }
    )
