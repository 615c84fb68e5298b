"""What the caches need from a base: its image and its text encoders."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Encoders(Protocol):
    """The frozen encoders of a base.

    The fingerprints name everything that changes an encoder's output: weights, precision and
    settings. A cache made under another fingerprint is never used.
    """

    image_fingerprint: str  # of the VAE
    text_fingerprint: str  # of tokenizers, text encoders, max_token_length, clip_skip

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) float32 on the CPU of pixels (B, 3, H, W) in [-1, 1].

        First the means, then the standard deviations of the latents, both before the VAE's
        scaling.
        """
        ...

    def encode_first_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        """What a model that goes on from a picture is told of the first frames of B videos
        (B, 3, frames, H, W): tensors (B, ...) on the CPU by name."""
        ...

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """What the text encoders say of B captions: tensors (B, ...) on the CPU by name."""
        ...
