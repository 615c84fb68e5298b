"""Pictures of what a model made."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SMALL = 256  # pictures are enlarged to at least this many pixels a side


def as_image(picture: Tensor) -> Image.Image:
    """A picture (C, H, W) in [-1, 1], grey or in colour; small ones are enlarged."""
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    factor = max(1, _SMALL // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
