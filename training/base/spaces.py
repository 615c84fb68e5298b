"""Which space the latents of a VAE are in."""

from __future__ import annotations

from typing import Any

from training.base.families.sana import DeepSpace
from training.base.latents import FrameSpace, LatentSpace, OpaqueSpace, PackedSpace

# The spaces of VAEs that are not `AutoencoderKL`, by the name of their class in diffusers.
_SPACES: dict[str, type[LatentSpace]] = {
    "AutoencoderKLQwenImage": FrameSpace,
    "AutoencoderKLWan": FrameSpace,
    "AutoencoderKLFlux2": PackedSpace,
    "AutoencoderKLQwenImage21": OpaqueSpace,
    "AutoencoderDC": DeepSpace,
}


def space_of(vae: Any) -> LatentSpace:
    """The space of a VAE, by its class."""
    return _SPACES.get(type(vae).__name__, LatentSpace)(vae)
