"""Measure the bundled digits base and classifier: the figures in README.md.

python training/experiments/digits/measure_base.py [--base DIR] [--grid PNG]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

# As in make_base.py: the repository root in place of this file's folder.
_FOLDER, _ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[3]
sys.path[:] = [str(_ROOT), *(p for p in sys.path if not p or Path(p).resolve() != _FOLDER)]

from training.base.frozen import FrozenBase, load_frozen  # noqa: E402
from training.data.sources.digits_images import (  # noqa: E402
    DigitsSplit,
    SplitName,
    load_digits_split,
)
from training.objective.digit_classifier import load_digit_classifier  # noqa: E402
from training.objective.frechet import frechet_distance  # noqa: E402
from training.objective.labelled import labelled_losses, labelled_samples  # noqa: E402
from training.options.config import TrainConfig  # noqa: E402

_BASE = _ROOT / "training" / "base" / "digits"


def labels_like(split: DigitsSplit, count: int) -> torch.Tensor:
    """About `count` labels (B,) in the split's class proportions: the split's own, repeated."""
    return split.labels.repeat(-(-count // len(split)))


def save_grid(drawn: torch.Tensor, real: DigitsSplit, path: Path, rows: int = 6) -> None:
    """Write a PNG, one column per digit: `rows` drawn images (B, 1, 8, 8), then three real ones."""
    columns = []
    for digit in range(10):
        of_digit = real.images[real.labels == digit][:3]
        columns.append(torch.cat([drawn[digit::10][:rows], of_digit]).flatten(0, 2))
    pixels = ((torch.cat(columns, 1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.NEAREST).save(path)


def report(frozen: FrozenBase, name: SplitName, count: int) -> None:
    """Print accuracy, loss and Frechet distances of one held-out split."""
    classifier = load_digit_classifier()
    train, split = load_digits_split("train"), load_digits_split(name)
    real = classifier.features(split.images)
    accuracy = (classifier(split.images).argmax(1) == split.labels).double().mean()
    print(f"{name}: classifier accuracy {accuracy:.4f}")
    floor = frechet_distance(classifier.features(train.images), real)
    print(f"{name}: Frechet distance of the training images {floor:.3f}")
    loss = labelled_losses(frozen, split.images, split.labels, draws=20).mean(0)
    print(f"{name}: loss {loss.mean():.5f}, by bin {' '.join(f'{x:.4f}' for x in loss)}")
    labels = labels_like(split, count)
    for seed in (0, 1):
        start = time.monotonic()
        drawn = labelled_samples(frozen, labels, seed=seed)
        seconds = time.monotonic() - start
        distance = frechet_distance(classifier.features(drawn), real)
        right = (classifier(drawn).argmax(1) == labels).double().mean()
        print(
            f"{name}: Frechet distance {distance:.3f}, recognised {right:.4f} "
            f"({len(labels)} samples, seed {seed}, 50 DDIM steps, {seconds:.0f} s)",
            flush=True,
        )


def main() -> None:
    """Measure on validation and test."""
    parser = argparse.ArgumentParser(description="Measure the bundled digits base.")
    parser.add_argument("--base", type=Path, default=_BASE, help="folder to measure")
    parser.add_argument("--grid", type=Path, help="also write a picture of samples, PNG")
    parser.add_argument("--samples", type=int, default=2000, help="images per Frechet distance")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    frozen = load_frozen(
        TrainConfig(base="digits", pretrained_model_name_or_path=str(arguments.base))
    )
    if arguments.grid:
        drawn = labelled_samples(frozen, torch.arange(10).repeat(6), seed=0)
        save_grid(drawn, load_digits_split("validation"), arguments.grid)
    splits: tuple[SplitName, ...] = ("validation", "test")
    for name in splits:
        report(frozen, name, arguments.samples)


if __name__ == "__main__":
    main()
