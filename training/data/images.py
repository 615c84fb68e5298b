"""Opening images of every kind as plain RGB or grey, upright."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dmp_common import PatchError

# What Pillow reads by itself; the endings a folder is searched for.
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that turn width into height
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def is_image(path: Path) -> bool:
    """Whether the ending is an image's. Files of the system (`._a.jpg`) are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def upright_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height of an image as it is to be seen, from its header alone.

    Raises:
        PatchError: not an image.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            sideways = _orientation(image) in _SIDEWAYS
    except _BROKEN as error:
        raise broken(name, error) from error
    if width < 1 or height < 1:
        raise broken(name, ValueError(f"{width} x {height} pixels"))
    return (height, width) if sideways else (width, height)


def open_image(file: BinaryIO, name: str, channels: int = 3) -> Image.Image:
    """An image in mode RGB (3 channels) or L (1 channel), upright.

    The first frame of an animation; transparent parts on white; 16-bit values scaled to 8 bits;
    CMYK by Pillow's plain formula; colour profiles are ignored, as other trainers do.

    Raises:
        PatchError: the image does not decode.
    """
    try:
        with Image.open(file) as image:
            image.seek(0)
            turned = _orientation(image) > 1
            image.load()
            return _plain(ImageOps.exif_transpose(image) if turned else image, channels)
    except _BROKEN as error:
        raise broken(name, error) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 for none, from what comes before the pixels.

    In a PNG it may also come after them; finding out would decode every image of a data set.
    """
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _plain(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image).astype(np.float64)
        scaled = values / 257 if values.max(initial=0) > 255 or ";16" in image.mode else values
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point pixels, whose white is not known; save 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB" if channels == 3 else "L")


def broken(name: str, error: Exception) -> PatchError:
    """The error for an image that cannot be used."""
    if isinstance(error, UnidentifiedImageError):
        found = "a file that is not an image, or is cut short"
    else:
        found = " ".join(str(error).split()) or type(error).__name__
    return PatchError(
        f"expected an image in {name}, found {found}: repair, replace or remove this file."
    )


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) float32 in [-1, 1]."""
    array = np.array(image, dtype=np.float32)
    array = array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
    return torch.from_numpy(array).div_(127.5).sub_(1.0)
