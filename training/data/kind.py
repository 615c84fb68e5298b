"""What a base needs from its data."""

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
        window: tokens of a caption that the text encoders read, without the marks of its beginning
            and end; None where it is not known.
        frames: of a video; 1 for pictures.
        first_frame: the model is told of the first frame of a video.
        stills: a picture may stand in for a video, one that stands still.
    """

    conditioning: Literal["caption", "label", "none"]
    channels: int = 3
    resolution: int = 512
    multiple: int = 64
    num_classes: int | None = None
    null_label: int | None = None
    square: bool = False
    window: int | None = None
    frames: int = 1
    stills: bool = False
    first_frame: bool = False

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape (C, H, W) of a picture's pixels, or (C, frames, H, W) of a video's."""
        frames = () if self.frames == 1 else (self.frames,)
        return (self.channels, *frames, height, width)
