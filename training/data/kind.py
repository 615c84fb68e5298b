"""What a base eats, as far as data is concerned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataKind:
    """What a base needs from its data.

    Args:
        conditioning: what goes with an image: a caption, a class id, or nothing.
        channels: of the pixels, 3 (RGB) or 1 (grey).
        resolution: of the base, where no resolution is asked for.
        multiple: sides of images are multiples of this: factor of the VAE times the model's own.
        num_classes: with class ids, how many the base knows.
        null_label: what the label of a dropped condition becomes.
        square: the model takes square inputs only; there are no buckets then.
    """

    conditioning: Literal["caption", "label", "none"]
    channels: int = 3
    resolution: int = 512
    multiple: int = 64
    num_classes: int | None = None
    null_label: int | None = None
    square: bool = False
