"""Measure the bundled digits base and classifier: the figures in README.md.

python training/experiments/digits/measure_base.py [--base DIR] [--grid PNG]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image

# As in make_base.py: the repository root in place of this file's folder.
_FOLDER, _ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[3]
sys.path[:] = [str(_ROOT), *(p for p in sys.path if not p or Path(p).resolve() != _FOLDER)]

from training.data.sources.digits_images import DigitsSplit, load_digits_split  # noqa: E402
from training.objective.digit_classifier import load_digit_classifier  # noqa: E402
from training.objective.frechet import frechet_distance  # noqa: E402
from training.objective.losses import denoising_loss_by_bin  # noqa: E402
from training.objective.sampling import sample  # noqa: E402


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


def report(base: DiTTransformer2DModel, scheduler: DDIMScheduler, name: str, count: int) -> None:
    """Print accuracy, loss and Frechet distances of one held-out split."""
    classifier, train, split = (
        load_digit_classifier(),
        load_digits_split("train"),
        load_digits_split(name),
    )
    real = classifier.features(split.images)
    accuracy = (classifier(split.images).argmax(1) == split.labels).double().mean()
    print(f"{name}: classifier accuracy {accuracy:.4f}")
    floor = frechet_distance(classifier.features(train.images), real)
    print(f"{name}: Frechet distance of the training images {floor:.3f}")
    loss = denoising_loss_by_bin(base, scheduler, split.images, split.labels, draws=20)
    print(f"{name}: loss {loss.mean():.5f}, by bin {' '.join(f'{x:.4f}' for x in loss)}")
    labels = labels_like(split, count)
    for seed in (0, 1):
        start = time.monotonic()
        drawn = sample(base, scheduler, labels, seed=seed)
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
    parser.add_argument("--base", type=Path, default=_FOLDER / "base", help="folder to measure")
    parser.add_argument("--grid", type=Path, help="also write a picture of samples, PNG")
    parser.add_argument("--samples", type=int, default=2000, help="images per Frechet distance")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = DiTTransformer2DModel.from_pretrained(arguments.base / "transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(arguments.base / "scheduler")
    if arguments.grid:
        drawn = sample(base, scheduler, torch.arange(10).repeat(6), seed=0)
        save_grid(drawn, load_digits_split("validation"), arguments.grid)
    for name in ("validation", "test"):
        report(base, scheduler, name, arguments.samples)


if __name__ == "__main__":
    main()
