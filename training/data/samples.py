"""What is known of an image before it is opened, and the rules of the subset it is in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from dmp_common.patch.serialize import open_regular
from training.data.captions.caption_rules import CaptionRules
from training.data.sizes import Size, SizeRules

_BLOCK = 64 * 1024
_UNCOMPRESSED = {".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Subset:
    """Images with common rules.

    Args:
        name: for the summary.
        repeats: how often each image is seen in an epoch.
        alpha_mask: whether the opacity of an image is its mask, where it has no mask file.
        masked: whether its images have mask files.
        batch: images of one process and step, where the data set sets it by itself.
        validation: share of its images kept for validation, and the seed of the choice.
    """

    name: str
    repeats: int
    sizes: SizeRules
    captions: CaptionRules
    alpha_mask: bool = False
    masked: bool = False
    batch: int | None = None
    validation: tuple[float, int | None] = (0.0, None)


@dataclass(frozen=True, slots=True)  # there are millions of them
class Sample:
    """One image.

    Args:
        key: unique and readable; random draws and the validation split are keyed by it.
        place: where its store finds it.
        size: width and height, upright.
        captions: its own captions, one of which is drawn; empty without any.
        label: class id.
        bucket: the size it is trained at, where its metadata says so.
        fingerprint: of its content, once it is needed.
        origin: key of the image itself, where it is in several subsets; the validation split is
            keyed by it.
        mask: path of its mask file.
        mask_print: fingerprint of the mask, once it is needed.
        fault: why it cannot be used, where that is known before it is loaded.
    """

    key: str
    place: Any
    size: Size
    subset: Subset
    captions: tuple[str, ...] = ()
    label: int | None = None
    bucket: Size | None = None
    fingerprint: str = ""
    origin: str = ""
    mask: str | None = None
    mask_print: str = ""
    fault: str = ""


class Store(Protocol):
    """Where the bytes of images are. Goes to worker processes, so it must be picklable."""

    def open(self, place: Any) -> BinaryIO:
        """The encoded image."""
        ...

    def name(self, place: Any) -> str:
        """How an error names it."""
        ...

    def fingerprint(self, place: Any) -> str:
        """Changes when the image changes: the key of its cache."""
        ...

    def stamp(self, place: Any) -> str:
        """Changes when the image changes, as far as can be told without reading all of it."""
        ...


class FileStore:
    """Images that are files: a place is a path, as text, which takes less memory."""

    def open(self, place: str) -> BinaryIO:
        """The file."""
        return open_regular(Path(place), "an image")

    def name(self, place: str) -> str:
        """The path."""
        return place

    def fingerprint(self, place: str) -> str:
        """Hash of the size and of three blocks of 64 KiB: first, middle, last.

        Not the time of change: copying a data set renews it, and tools that keep it let a replaced
        image pass for the old one. Not the whole content: every start would read all of it. An
        image that was edited and saved again differs up to its last block, because it is
        compressed; formats that may not be are read whole.
        """
        path = Path(place)
        size = path.stat().st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with open_regular(path, "an image") as file:
            if path.suffix.lower() in _UNCOMPRESSED:
                digest.update(file.read())
                return digest.hexdigest()
            for start in sorted({0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
        return digest.hexdigest()

    def stamp(self, place: str) -> str:
        """Path, length and time of change."""
        try:
            found = Path(place).stat()
        except OSError:
            return place  # whoever opens it says what is wrong
        return f"{place}:{found.st_size}:{found.st_mtime_ns}"


@dataclass(frozen=True)
class TensorStore:
    """Images that are tensors already, (N, C, H, W) in [-1, 1]: a place is a row."""

    images: Tensor

    def fingerprint(self, place: int) -> str:
        """Hash of an image."""
        image = self.images[place].contiguous().numpy()
        return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
