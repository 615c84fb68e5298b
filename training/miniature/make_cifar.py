"""Train the `cifar10` base, a small DiT in pixels, or check that it has converged.

    python -m training.miniature.make_cifar --cifar cifar10-train.zip --out DIR
    python -m training.miniature.make_cifar --cifar cifar10-train.zip --out DIR --extra 0.2
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from training.miniature.cifar import ImageSplit, load_cifar_split
from training.miniature.pretraining import Pretraining, Recipe, as_float, untie

RECIPE = Recipe(
    size=32,
    channels=3,
    patch_size=4,
    layers=6,
    heads=2,
    head_width=48,
    steps=9000,
    annealing="linear",
    ema_decay=0.998,
    weight_decay=0.02,
    flip=True,
    autocast=True,
)
_KEPT = 600  # steps between states of the constant part


def make_base(out: Path, recipe: Recipe, data: ImageSplit, held_out: ImageSplit) -> torch.Tensor:
    """Trains a base, or goes on from the nearest kept state; returns its validation loss (10,)."""
    from training.evaluation.losses import denoising_loss_by_bin

    run, states = Pretraining(recipe, data.images, data.labels, compiled=True), out / "states"
    states.mkdir(parents=True, exist_ok=True)
    own = states / f"annealing-{recipe.steps}.pt"
    kept = {int(path.stem): path for path in states.glob("[0-9]*.pt")}
    usable = [step for step in kept if step <= recipe.constant_steps]
    if own.is_file():
        run.load(own)
    elif usable:
        run.load(kept[max(usable)])
    start = time.monotonic()

    def said(text: str) -> None:
        print(f"{text} ({time.monotonic() - start:.0f} s)", flush=True)

    while run.step < recipe.steps:
        constant = run.step < recipe.constant_steps
        ends = recipe.constant_steps if constant else recipe.steps
        run.run(min(ends, (run.step // _KEPT + 1) * _KEPT), said)
        run.save(states / f"{run.step}.pt" if run.step <= recipe.constant_steps else own)
    model = untie(run.average)
    loss = denoising_loss_by_bin(
        model, run.scheduler, as_float(held_out.images), held_out.labels, draws=1, batch_size=250
    )
    folder = out / ("base" if recipe.steps == RECIPE.steps else f"base-{recipe.steps}")
    model.save_pretrained(folder / "transformer")
    run.scheduler.save_pretrained(folder / "scheduler")
    said(
        f"{folder}: validation loss {loss.mean():.5f}, by timestep bin "
        + " ".join(f"{x:.4f}" for x in loss)
    )
    return loss


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cifar", type=Path, required=True, help="zip or folder of class folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument(
        "--extra", type=float, default=0.0, help="also train that share longer and compare"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load_cifar_split(arguments.cifar, "train")
    held_out = load_cifar_split(arguments.cifar, "validation")
    recipe = replace(RECIPE, steps=arguments.steps)
    loss = make_base(arguments.out, recipe, data, held_out).mean()
    if arguments.extra:
        longer = replace(recipe, steps=round(recipe.steps * (1 + arguments.extra)))
        other = make_base(arguments.out, longer, data, held_out).mean()
        print(
            f"convergence: {recipe.steps} steps {loss:.5f}, {longer.steps} steps {other:.5f}, "
            f"change {100 * (other / loss - 1):+.3f} %"
        )


if __name__ == "__main__":
    main()
