"""Random values that make a difference, for patches and for models that start at zero."""

from __future__ import annotations

import torch

from dmp_common import Patch


def randomise(patch: Patch, seed: int, std: float = 0.5) -> Patch:
    """Fills a patch; the fields it adds are of about `std`, whatever the number of prompts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            scale = std * patch.variant.count if name.startswith("pools") else std
            parameter.normal_(0.0, scale, generator=generator)
    return patch
