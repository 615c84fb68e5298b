"""A small convolutional classifier of CIFAR-10; its features measure Frechet distances."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from training.experiments.miniature.cifar import CLASSES, SIZE, ImageSplit
from training.experiments.miniature.pretraining import as_float

FEATURES = 128
_PADDING = 4  # pixels an image moves by, at most, in training
_BATCH = 128


class CifarClassifier(nn.Module):
    """Images (B, 3, 32, 32) in [-1, 1] to class logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 128, 128)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.classify = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 128) before the last layer, for images (B, 3, 32, 32).

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"expected images (B, 3, {SIZE}, {SIZE}), found {tuple(images.shape)}")
        x = images
        for layer, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = F.gelu(norm(convolution(x)))
            if layer in (0, 2, 3):
                x = F.max_pool2d(x, 2)  # 16, 8, 4
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 10)."""
        return self.classify(self.features(images))


def train_cifar_classifier(data: ImageSplit, epochs: int = 5, seed: int = 0) -> CifarClassifier:
    """Train on the training split; images are mirrored and moved by up to four pixels."""
    torch.manual_seed(seed)
    model = CifarClassifier().train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = epochs * (len(data) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    anneal = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(data) // _BATCH) == 0:
            order = torch.randperm(len(data))
        first = step % (len(data) // _BATCH) * _BATCH
        rows = order[first : first + _BATCH]
        images = _moved(as_float(data.images[rows]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        anneal.step()
    # As `load_cifar_classifier` has it: another layout rounds differently.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def _moved(images: Tensor) -> Tensor:
    """Each image mirrored or not, the batch moved together."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    images = F.pad(images, [_PADDING] * 4, mode="reflect")
    dx, dy = torch.randint(2 * _PADDING + 1, (2,)).tolist()
    return images[:, :, dy : dy + SIZE, dx : dx + SIZE]


@torch.no_grad()
def features_of(model: CifarClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (B, 128) of images, uint8 or in [-1, 1]."""
    return torch.cat([model.features(as_float(part)) for part in images.split(batch_size)])


@torch.no_grad()
def classes_of(model: CifarClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Classes (B,) of images, uint8 or in [-1, 1]."""
    return torch.cat([model(as_float(part)).argmax(1) for part in images.split(batch_size)])


def load_cifar_classifier(path: Path) -> CifarClassifier:
    """A classifier from its file, in eval mode and frozen.

    Raises:
        FileNotFoundError: the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the classifier at {path}, found nothing: make it with "
            "`python -m training.experiments.miniature.make_cifar`"
        )
    model = CifarClassifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
