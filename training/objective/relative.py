"""How the losses of the base are measured for weights that make the loss relative.

Rounding counts as loss: under bfloat16 autocast a small DiT in pixels is off by 4.5e-5 (mean
square; docs/RESULTS.md). Where a base loses no more than that, train in full precision.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from dmp_common.patch.levels import BINS
from training.options.config import TrainConfig

IMAGES = 256
# Four times that mean square; float16 has three more bits.
_ROUNDED = {"bf16": 2e-4, "fp16": 3e-6}


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
