"""A small convolutional digit classifier; its features measure Frechet distances."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

CLASSIFIER_PATH = Path(__file__).resolve().parent / "digit_classifier.safetensors"
FEATURES = 64


class DigitClassifier(nn.Module):
    """Images (B, 1, 8, 8) in [-1, 1] to class logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.project = nn.Linear(64 * 2 * 2, FEATURES)
        self.classify = nn.Linear(FEATURES, 10)
        self.dropout = nn.Dropout(0.3)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 64) before the last linear layer, for images (B, 1, 8, 8).

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise ValueError(f"expected images (B, 1, 8, 8), found {tuple(images.shape)}")
        x = F.gelu(self.conv1(images))  # (B, 32, 8, 8)
        x = F.max_pool2d(F.gelu(self.conv2(x)), 2)  # (B, 64, 4, 4)
        x = F.max_pool2d(F.gelu(self.conv3(x)), 2)  # (B, 64, 2, 2)
        return F.gelu(self.project(self.dropout(x.flatten(1))))  # (B, 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (B, 10)."""
        return self.classify(self.dropout(self.features(images)))


def load_digit_classifier(path: Path = CLASSIFIER_PATH) -> DigitClassifier:
    """The bundled classifier, trained on the training split, in eval mode and frozen.

    Raises:
        FileNotFoundError: the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no classifier at {path}; it is part of the repository: restore it with git, "
            "or make it with `python training/experiments/digits/make_base.py --out DIR`"
        )
    model = DigitClassifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
