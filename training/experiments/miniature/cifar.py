"""CIFAR-10 from class folders or a zip of them, in one fixed split.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SplitName = Literal["train", "validation", "test"]
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SIZE = 32
PER_CLASS = {"validation": 500, "test": 500}  # the rest is for training
_ENDINGS = (".jpg", ".jpeg", ".png")
_SEED = 2405_17825


@dataclass(frozen=True)
class ImageSplit:
    """One split: images (B, 3, 32, 32) uint8, labels (B,) int64, in the order of their names."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return self.labels.shape[0]


def split_names(names: list[str], split: SplitName) -> list[str]:
    """Which images of a class are in a split: the same ones whatever the order of the names.

    Raises:
        ValueError: too few images.
    """
    if split not in get_args(SplitName):
        raise ValueError(f"expected {', '.join(get_args(SplitName))}, found {split!r}")
    needed = sum(PER_CLASS.values())
    if len(names) <= needed:
        raise ValueError(
            f"expected more than {needed} images of each class, found {len(names)}: give the "
            "training set of CIFAR-10"
        )
    names = sorted(names)
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(names), generator=generator).tolist()
    validation, test = order[: PER_CLASS["validation"]], order[PER_CLASS["validation"] : needed]
    chosen = {"validation": validation, "test": test, "train": order[needed:]}[split]
    return [names[row] for row in sorted(chosen)]


def load_cifar_split(source: str | Path, split: SplitName) -> ImageSplit:
    """A split of CIFAR-10.

    Args:
        source: a folder or zip with one folder of 32 x 32 images for each of the ten classes.

    Raises:
        ValueError: classes are missing, or images of another size.
        OSError: nothing there.
    """
    with _Files(Path(source)) as files:
        return files.read(lambda names: split_names(names, split))


def shrunk(images: Tensor, size: int) -> Tensor:
    """uint8 images (B, 3, 32, 32) at a smaller size that divides 32: means of squares."""
    if size == SIZE:
        return images
    small = torch.nn.functional.avg_pool2d(images.float(), SIZE // size)
    return small.round().to(torch.uint8)


def export_folders(source: str | Path, out: Path, size: int = SIZE) -> None:
    """Writes the images to out/<split>/<class>/, as the trainer reads them.

    Args:
        size: of the images; smaller ones are PNG files, those of the source's size are copied.
    """
    with _Files(Path(source)) as files:
        for split in get_args(SplitName):
            for name in CLASSES:
                folder = out / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for entry in split_names(files.names(name), split):
                    if size == SIZE:
                        (folder / Path(entry).name).write_bytes(files.data(entry))
                        continue
                    pixels = torch.from_numpy(files.image(entry).copy()).permute(2, 0, 1)
                    small = shrunk(pixels[None], size)[0].permute(1, 2, 0).numpy()
                    Image.fromarray(small).save(folder / f"{Path(entry).stem}.png")


def load_exported(folder: Path, split: SplitName, size: int = SIZE) -> ImageSplit:
    """A split from the folders of `export_folders`."""
    with _Files(folder / split, size) as files:
        return files.read(sorted)


class _Files:
    """A zip or a folder as images by class."""

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.path, self.size = path, size
        self.zip = zipfile.ZipFile(path) if path.is_file() else None
        if self.zip is not None:
            entries = self.zip.namelist()
        elif path.is_dir():
            entries = [p.relative_to(path).as_posix() for p in path.glob("*/*")]
        else:
            raise FileNotFoundError(
                f"expected CIFAR-10 as a zip or a folder of class folders at {path}, found nothing"
            )
        self.by_class: dict[str, list[str]] = defaultdict(list)
        for entry in entries:
            parts = entry.split("/")
            if len(parts) >= 2 and entry.lower().endswith(_ENDINGS):
                self.by_class[parts[-2]].append(entry)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.zip is not None:
            self.zip.close()

    def read(self, choose: Callable[[list[str]], list[str]]) -> ImageSplit:
        """The chosen images of every class."""
        images, labels = [], []
        for label, name in enumerate(CLASSES):
            for entry in choose(self.names(name)):
                images.append(self.image(entry))
                labels.append(label)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return ImageSplit(pixels, torch.tensor(labels))

    def names(self, name: str) -> list[str]:
        if not self.by_class[name]:
            raise ValueError(
                f"expected a folder {name!r} of images in {self.path}, found "
                f"{', '.join(sorted(k for k, v in self.by_class.items() if v)) or 'no images'}"
            )
        return self.by_class[name]

    def data(self, entry: str) -> bytes:
        return (self.path / entry).read_bytes() if self.zip is None else self.zip.read(entry)

    def image(self, entry: str) -> np.ndarray:
        with Image.open(io.BytesIO(self.data(entry))) as opened:
            image = opened.convert("RGB")
        if image.size != (self.size, self.size):
            raise ValueError(
                f"expected images of {self.size} x {self.size} pixels, found {image.size} in "
                f"{entry}"
            )
        return np.asarray(image)
