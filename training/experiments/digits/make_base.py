"""Train the bundled `digits` base and its classifier from fixed seeds, or check convergence.

    python training/experiments/digits/make_base.py --out DIR

makes both, as bundled; --extra 0.2 also trains 20 % longer and compares.

Data: the training split. The validation split chose the recipe below; the test split is not read.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

# Run as a script, Python puts this file's folder first on sys.path, where `classifier` would be a
# top-level module. The repository root belongs there instead.
_FOLDER, _ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[3]
sys.path[:] = [str(_ROOT), *(p for p in sys.path if not p or Path(p).resolve() != _FOLDER)]

from training.data.sources.digits_images import NUM_CLASSES, DigitsSplit, load_digits_split  # noqa: E402
from training.experiments.miniature.pretraining import (  # noqa: E402
    BaseRecipe,
    Pretraining,
    build_scheduler,
    untie,
)
from training.objective.digit_classifier import DigitClassifier  # noqa: E402
from training.objective.labelled import labelled_losses, pixel_base  # noqa: E402

# Chosen on validation loss.
RECIPE = BaseRecipe(
    size=8,
    channels=1,
    patch_size=2,
    layers=6,
    heads=2,
    head_width=32,
    classes=NUM_CLASSES,
    steps=9600,
)


def train_digit_classifier(data: DigitsSplit, steps: int = 1500, seed: int = 0) -> DigitClassifier:
    """Train the classifier on the training split; images move by up to one pixel."""
    torch.manual_seed(seed)
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data), (128,))
        dx, dy = torch.randint(3, (2,)).tolist()
        images = F.pad(data.images[rows], (1, 1, 1, 1), value=-1.0)  # -1 is background
        images = images[:, :, dy : dy + 8, dx : dx + 8]
        loss = F.cross_entropy(model(images), data.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        anneal.step()
    return model.eval()


def validation_loss(model: nn.Module) -> torch.Tensor:
    """Denoising loss (10,) by timestep bin on the validation split, 60,000 fixed draws."""
    data = load_digits_split("validation")
    frozen = pixel_base("digits", model, build_scheduler())
    return labelled_losses(frozen, data.images, data.labels, draws=20).mean(0)


def make_digit_classifier(out: Path, data: DigitsSplit) -> None:
    """Train and save the classifier; print its validation accuracy."""
    classifier = train_digit_classifier(data)
    held_out = load_digits_split("validation")
    with torch.no_grad():
        right = classifier(held_out.images).argmax(1) == held_out.labels
    print(f"classifier: validation accuracy {right.double().mean():.4f}", flush=True)
    save_file(classifier.state_dict(), out / "classifier.safetensors")


def make_digits_base(out: Path, recipe: BaseRecipe, data: DigitsSplit) -> torch.Tensor:
    """Train and save base and scheduler in diffusers format; returns the validation loss (10,)."""
    start = time.monotonic()
    run = Pretraining(recipe, data.images, data.labels)
    run.run(recipe.steps, lambda text: print(text, flush=True))
    model = untie(run.average)
    loss = validation_loss(model)
    print(
        f"base: {recipe.steps} steps in {time.monotonic() - start:.0f} s, validation loss "
        f"{loss.mean():.5f}, by timestep bin {' '.join(f'{x:.4f}' for x in loss)}",
        flush=True,
    )
    model.save_pretrained(out / "transformer")
    build_scheduler().save_pretrained(out / "scheduler")
    return loss


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the bundled digits base and its classifier from fixed seeds.",
        epilog="Writes DIR/base/transformer, DIR/base/scheduler and DIR/classifier.safetensors.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--extra",
        type=float,
        default=0.0,
        metavar="F",
        help="convergence check: train once more, F longer (0.2: 20 %% more steps, the whole "
        "schedule stretched), and print how far the validation loss moves",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (default 1, as bundled); another number rounds differently",
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.extra <= 10:
        parser.error(f"--extra: expected a fraction from 0 to 10, found {arguments.extra}")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, found {arguments.threads}")
    return arguments


def main() -> None:
    """Make everything the command line asks for."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, recipe = load_digits_split("train"), RECIPE
    make_digit_classifier(arguments.out, data)
    loss = make_digits_base(arguments.out / "base", recipe, data).mean()
    if arguments.extra:
        longer = replace(recipe, steps=round(recipe.steps * (1 + arguments.extra)))
        other = make_digits_base(arguments.out / "base_longer", longer, data).mean()
        print(
            f"convergence: {recipe.steps} steps {loss:.5f}, {longer.steps} steps {other:.5f}, "
            f"change {100 * (other / loss - 1):+.3f} %"
        )


if __name__ == "__main__":
    main()
