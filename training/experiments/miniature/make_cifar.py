r"""Train what the miniatures on CIFAR-10 need: two small DiTs in pixels, and a classifier.

    python -m training.experiments.miniature.make_cifar --cifar ZIP --out DIR \
        classifier folders cifar10
    python -m training.experiments.miniature.make_cifar --cifar ZIP --out DIR \
        cifar10-s --extra 0.2

`--extra 0.2` checks convergence: it trains once more, 20 % longer, and prints how far the
validation loss moves. A run that was stopped goes on from its last state.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.experiments.miniature.cifar import (
    ImageSplit,
    export_folders,
    load_cifar_split,
    shrunk,
)
from training.experiments.miniature.cifar_classifier import train_cifar_classifier
from training.experiments.miniature.pretraining import BaseRecipe, Pretraining, as_float, untie
from training.objective.labelled import labelled_losses, pixel_base

RECIPE = BaseRecipe(
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
    autocast=7200,
)
RECIPES = {
    "cifar10": RECIPE,
    # At 16 x 16 pixels, 16 tokens: so small that a computer without GPU can do a study. Processors
    # without matrix units for bfloat16 are twice as fast in float32.
    "cifar10-s": replace(
        RECIPE, size=16, heads=2, head_width=32, batch=128, steps=30000, autocast=2400
    ),
}
_KEPT = 600  # steps between states of the constant part


def make_cifar_base(
    out: Path, recipe: BaseRecipe, data: ImageSplit, held_out: ImageSplit, name: str
) -> torch.Tensor:
    """Trains a base, or goes on from the nearest kept state; returns its validation loss (10,).

    Args:
        out: folder of the base and its states.
        name: of the folder in `out` that diffusers reads.
    """
    images = shrunk(data.images, recipe.size)
    run, states = Pretraining(recipe, images, data.labels, compiled=True), out / "states"
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
    loss = labelled_losses(
        pixel_base("cifar10", model, run.scheduler),
        as_float(shrunk(held_out.images, recipe.size)),
        held_out.labels,
        draws=1,
        batch=250,
    ).mean(0)
    model.save_pretrained(out / name / "transformer")
    run.scheduler.save_pretrained(out / name / "scheduler")
    said(
        f"{out / name}: validation loss {loss.mean():.5f}, by timestep bin "
        + " ".join(f"{x:.4f}" for x in loss)
    )
    return loss


def make_cifar_classifier(out: Path, data: ImageSplit, held_out: ImageSplit) -> None:
    """Trains and saves the classifier; prints its validation accuracy."""
    model = train_cifar_classifier(data)
    with torch.no_grad():
        right = model(as_float(held_out.images)).argmax(1) == held_out.labels
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "classifier.safetensors")
    print(f"classifier: validation accuracy {right.double().mean():.4f}", flush=True)


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=[*RECIPES, "classifier", "folders"])
    parser.add_argument("--cifar", type=Path, required=True, help="zip or folder of class folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--extra", type=float, default=0.0, help="also train that share longer and compare"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        data = load_cifar_split(arguments.cifar, "train")
        held_out = load_cifar_split(arguments.cifar, "validation")
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        parser.error(f"--cifar {arguments.cifar}: {error}")
    if "folders" in arguments.what:
        for size in {recipe.size for recipe in RECIPES.values()}:
            export_folders(arguments.cifar, out / f"images-{size}", size)
    if "classifier" in arguments.what:
        make_cifar_classifier(out, data, held_out)
    for name, recipe in RECIPES.items():
        if name not in arguments.what:
            continue
        loss = make_cifar_base(out / name, recipe, data, held_out, "base").mean()
        if arguments.extra:
            longer = replace(recipe, steps=round(recipe.steps * (1 + arguments.extra)))
            other = make_cifar_base(out / name, longer, data, held_out, "base-longer").mean()
            print(
                f"convergence of {name}: {recipe.steps} steps {loss:.5f}, {longer.steps} steps "
                f"{other:.5f}, change {100 * (other / loss - 1):+.3f} %"
            )


if __name__ == "__main__":
    main()
