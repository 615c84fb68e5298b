"""What the miniatures are run on: a base, its data in three splits, and features to judge by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from training.data.sources.digits_images import load_digits_split
from training.experiments.miniature.cifar import SIZE, SplitName, load_exported
from training.experiments.miniature.cifar_classifier import (
    CifarClassifier,
    classes_of,
    features_of,
    load_cifar_classifier,
)
from training.experiments.miniature.make_cifar import RECIPES
from training.objective.digit_classifier import load_digit_classifier

# As many steps as people take: with a good solver, and with the one that papers report.
SAMPLERS = {"unipc": 20, "ddim": 20}
BUNDLED = Path(__file__).resolve().parent / "bundled"
CLASSIFIER = "classifier.safetensors"
DIGITS_BASE = Path(__file__).resolve().parents[2] / "base" / "digits"


class Split(Protocol):
    """Images (B, C, H, W) with labels (B,)."""

    @property
    def images(self) -> Tensor:
        """(B, C, H, W)."""

    @property
    def labels(self) -> Tensor:
        """(B,)."""


@dataclass(frozen=True)
class Subject:
    """A base to try methods on.

    Args:
        base: its name in the table of bases.
        weights: its folder in diffusers format.
        options: of the trainer: its data, and what all methods share.
        split: gives "train", "validation" or "test".
        features: of images (B, C, H, W) in [-1, 1], (B, F).
        classes: that a classifier finds in such images, (B,).
        samples: generated images for one Frechet distance; labels are the split's, repeated.
        samplers: deterministic ones, with their steps.
        draws: of timestep and noise for each held-out image and bin.
        loss_images: held-out images for the loss, every so many; None for all.
    """

    base: str
    weights: Path
    options: Mapping[str, Any]
    split: Callable[[SplitName], Split]
    features: Callable[[Tensor], Tensor]
    classes: Callable[[Tensor], Tensor]
    samples: int
    samplers: Mapping[str, int]
    draws: int
    loss_images: int | None = None

    def labels(self, split: SplitName) -> Tensor:
        """(samples,) in the class proportions of a split."""
        labels = self.split(split).labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return labels[order].repeat(-(-self.samples // len(labels)))[: self.samples]


def digits() -> Subject:
    """The bundled base on the digits of scikit-learn."""
    classifier = load_digit_classifier()

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return classifier.features(images)

    return Subject(
        base="digits",
        weights=DIGITS_BASE,
        options={"dataset_name": "digits", "train_batch_size": 128},
        split=load_digits_split,
        features=features,
        classes=lambda images: classifier(images).argmax(1),
        samples=2000,
        samplers=SAMPLERS,
        draws=10,
    )


def open_subject(name: str, data: Path | None) -> Subject:
    """The subject of a name.

    Args:
        data: folder that `make_cifar` filled; not for digits.

    Raises:
        ValueError: it is missing.
    """
    if name == "digits":
        return digits()
    if data is None:
        raise ValueError(f"expected --data for {name}: the folder of make_cifar")
    return cifar10(name, data)


def _enlarged(pictures: Tensor) -> Tensor:
    """At the size the classifier was trained at."""
    return interpolate(pictures, (SIZE, SIZE), mode="bilinear", align_corners=False)


def cifar10(name: str, folder: Path) -> Subject:
    """A base on CIFAR-10, with the images in the folder that `make_cifar` filled.

    Base and classifier are those of the folder, or else the bundled ones.

    Raises:
        FileNotFoundError: there is one that is nowhere.
    """
    size = RECIPES[name].size
    images, weights = folder / f"images-{size}", folder / name / "base"
    if not weights.is_dir() and (BUNDLED / name).is_dir():
        weights = BUNDLED / name
    judge = folder / CLASSIFIER
    if not judge.is_file():
        judge = BUNDLED / CLASSIFIER
    for path in (images / "train", weights / "transformer"):
        if not path.is_dir():
            raise FileNotFoundError(
                f"expected {path}, found nothing: make it with "
                "`python -m training.experiments.miniature.make_cifar`"
            )

    @cache
    def split(which: SplitName) -> Split:
        return load_exported(images, which, size)

    @cache
    def classifier() -> CifarClassifier:  # where only losses are asked for it may be missing
        return load_cifar_classifier(judge)

    return Subject(
        base=name,
        weights=weights,
        options={
            "train_data_dir": str(images / "train"),
            "flip_aug": True,
            "train_batch_size": RECIPES[name].batch,
        },
        split=split,
        features=lambda pictures: features_of(classifier(), _enlarged(pictures)),
        classes=lambda pictures: classes_of(classifier(), _enlarged(pictures)),
        samples=2500,
        samplers=SAMPLERS,
        draws=1,
        loss_images=2000,
    )
