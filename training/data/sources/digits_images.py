"""scikit-learn's `load_digits` in one fixed split: 1,797 real 8 x 8 grey images of ten classes.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, DOI 10.24432/C50P49 (CC BY 4.0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

SplitName = Literal["train", "validation", "test"]

NUM_CLASSES = 10
IMAGES = 1797
SPLIT_SEED = 2405_17825
# Per class; the rest (104 to 113 images a class) is the training split. 400 test images keep the
# covariance of 64 features well conditioned, which the Frechet distance needs.
VALIDATION_PER_CLASS = 30
TEST_PER_CLASS = 40


@dataclass(frozen=True)
class DigitsSplit:
    """One split: images (B, 1, 8, 8) float32 in [-1, 1], -1 is background; labels (B,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Number of images."""
        return self.labels.shape[0]


def load_digits_split(split: SplitName) -> DigitsSplit:
    """Load one of the three disjoint, class-stratified splits; the same images everywhere.

    Raises:
        ValueError: `split` is not a split's name, or scikit-learn's data set is not the one known.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"expected split 'train', 'validation' or 'test', found {split!r}")
    images, labels = _load_all()
    indices = torch.tensor(split_indices(labels.tolist())[split])
    return DigitsSplit(images[indices], labels[indices])


def split_indices(labels: list[int]) -> Mapping[SplitName, list[int]]:
    """Rows of each split, ascending, for the labels of the whole data set in its own order.

    Rows are ranked by a hash of seed and row number, not by a random generator: generators may
    change between releases of numpy and torch, and a changed split would leak test images.
    """
    indices: dict[SplitName, list[int]] = {"train": [], "validation": [], "test": []}
    for digit in range(NUM_CLASSES):
        rows = [row for row, label in enumerate(labels) if label == digit]
        rows.sort(key=lambda row: hashlib.sha256(f"{SPLIT_SEED}:{row}".encode()).digest())
        chosen, rest = rows[:VALIDATION_PER_CLASS], rows[VALIDATION_PER_CLASS:]
        indices["validation"] += chosen
        indices["test"] += rest[:TEST_PER_CLASS]
        indices["train"] += rest[TEST_PER_CLASS:]
    return {name: sorted(rows) for name, rows in indices.items()}


@cache
def _load_all() -> tuple[torch.Tensor, torch.Tensor]:
    """All images (1797, 1, 8, 8) in [-1, 1] and labels (1797,), in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn, which is not installed; "
            "install the trainer's dependencies: pip install -e '.[train]' "
            "(or: pip install scikit-learn)"
        ) from error
    data = load_digits()
    if data.images.shape != (IMAGES, 8, 8):
        raise ValueError(
            f"expected scikit-learn's digits as {(IMAGES, 8, 8)}, found {data.images.shape}; "
            "this scikit-learn release carries another data set: install another release"
        )
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    return images / 8 - 1, torch.tensor(data.target, dtype=torch.int64)  # 17 levels, 0 to 16
