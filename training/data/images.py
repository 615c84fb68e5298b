"""Opening images of every kind as plain RGB or grey, upright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dmp_common import PatchError
from dmp_common.errors import printable_path

# Endings of images that Pillow reads, by itself or with a plug-in that is installed.
_ENDINGS = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
     ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".qoi"}
)  # fmt: skip
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})  # which are not read
# What file managers, cameras and disks put beside images: mostly thumbnails of them.
SYSTEM_FOLDERS = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found",
                            "system volume information"})  # fmt: skip
_HEIF = "pip install pillow-heif"
_JXL = "pip install pillow-jxl-plugin"
_INSTALL = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".jxl": _JXL}
# Beginnings of files that are often called .jpg, and what they are.
_OTHERS = (
    (4, b"ftyphe", f"a HEIC image; {_HEIF} to read it"),
    (4, b"ftypmif1", f"a HEIF image; {_HEIF} to read it"),
    (0, b"\xff\x0a", f"a JPEG XL image; {_JXL} to read it"),
    (4, b"JXL \r\n", f"a JPEG XL image; {_JXL} to read it"),
    (0, b"<", "a web page or an SVG drawing"),
)
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that turn width into height
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_FLOATING = "floating point pixels, whose white is not known; save 8 or 16 bits"


class BrokenImageError(PatchError):
    """An image that cannot be used: unlike other errors, a run may do without a few of these."""


@cache
def endings() -> frozenset[str]:
    """Endings of the images that can be read here; registers the plug-ins that are installed."""
    # Both are extras; `how_to_read` names them where a file needs one.
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    return _ENDINGS & Image.registered_extensions().keys()


def how_to_read(ending: str) -> str | None:
    """What to install for images of an ending (lower case) that cannot be read here.

    None for an ending that can be read, or that is no image's.
    """
    if ending not in _ENDINGS or ending in endings():
        return None
    return _INSTALL.get(ending, "pip install --upgrade pillow")


def is_image(path: Path) -> bool:
    """Whether the ending is an image's. Files of the system (`._a.jpg`) are none."""
    return path.suffix.lower() in endings() and not path.name.startswith(".")


def upright_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Width and height of an image as it is to be seen, from its header alone.

    Raises:
        BrokenImageError: not an image.
    """
    endings()
    try:
        with Image.open(file) as image:
            width, height = image.size
            sideways = _orientation(image) in _SIDEWAYS
            if image.mode == "F":
                raise ValueError(_FLOATING)
    except UnidentifiedImageError as error:
        raise _unidentified(file, name) from error
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
        BrokenImageError: the image does not decode.
    """
    with _reading(file, name) as image:
        return _plain(_frame(image, 0), channels)


def open_frames(
    file: BinaryIO, name: str, channels: int, count: int, stills: bool
) -> list[Image.Image]:
    """The first frames of an animation, each as `open_image` has a picture; one frame of a picture
    that stands still.

    Args:
        count: of frames.
        stills: whether pictures may do so.

    Raises:
        BrokenImageError: the image does not decode.
        PatchError: it has fewer frames.
    """
    with _reading(file, name) as image:
        found = min(_frames_of(image, name, count, stills), count)
        return [_plain(_frame(image, number), channels) for number in range(found)]


def require_frames_in(file: BinaryIO, name: str, count: int, stills: bool) -> None:
    """Refuses an animation that is too short; arguments as of `open_frames`.

    Raises:
        PatchError: it has fewer frames, or is no image.
    """
    with _reading(file, name) as image:
        _frames_of(image, name, count, stills)


def _frames_of(image: Image.Image, name: str, count: int, stills: bool) -> int:
    # The second picture in a camera's JPEG is a thumbnail, or that of another eye.
    found = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    if found < count and not (stills and found == 1):
        raise PatchError(
            f"expected an animation of at least {count} frames in {printable_path(name)}, as "
            f"--frames says, found {found}: replace or remove this file, or lower --frames."
        )
    return found


@contextmanager
def _reading(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """An image whose frames are read within; any of it may be found broken.

    Raises:
        BrokenImageError: the image does not decode.
    """
    endings()
    try:
        with Image.open(file) as image:
            yield image
    except PatchError:  # which is a ValueError, and says what it is
        raise
    except _BROKEN as error:
        raise broken(name, error) from error


def _frame(image: Image.Image, number: int) -> Image.Image:
    """A frame of an image, upright."""
    image.seek(number)
    turned = _orientation(image) > 1
    image.load()
    return ImageOps.exif_transpose(image) if turned else image


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
        raise ValueError(_FLOATING)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB" if channels == 3 else "L")


def opacity(file: BinaryIO, name: str) -> Image.Image | None:
    """How opaque an image is at each pixel, in mode L, upright; None where it is so everywhere.

    Raises:
        BrokenImageError: the image does not decode.
    """
    with _reading(file, name) as image:
        first = _frame(image, 0)
        return first.convert("RGBA").getchannel("A") if first.has_transparency_data else None


def open_mask(file: BinaryIO, name: str) -> Image.Image:
    """A mask image in mode L, upright: its red channel, as with kohya, or its grey values.

    Raises:
        BrokenImageError: the image does not decode.
    """
    return open_image(file, name, 3).getchannel(0)


def broken(name: str, error: Exception) -> BrokenImageError:
    """The error for an image that cannot be used."""
    if isinstance(error, UnidentifiedImageError):
        found = "a file that is not an image, or is cut short"
    else:
        found = " ".join(str(error).split()) or type(error).__name__
    return _broken(name, found)


def _broken(name: str, found: str) -> BrokenImageError:
    return BrokenImageError(
        f"expected an image in {printable_path(name)}, found {found}: repair, replace or remove "
        "this file."
    )


def _unidentified(file: BinaryIO, name: str) -> BrokenImageError:
    file.seek(0)
    head = file.read(16).lstrip()
    for start, mark, meaning in _OTHERS:
        if head[start:].startswith(mark):
            return _broken(name, meaning)
    return _broken(name, "a file that is not an image, or is cut short")


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) float32 in [-1, 1]."""
    array = np.array(image, dtype=np.float32)
    array = array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
    return torch.from_numpy(array).div_(127.5).sub_(1.0)
