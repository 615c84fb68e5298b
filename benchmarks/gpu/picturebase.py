"""The base of part 2: a DiT on CIFAR-10, trained on the device within a budget of seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from PIL import Image
from torch import Tensor, nn

from benchmarks.gpu.subjects import Setup
from dmp_common import bases, register_base
from training.base.families.table import DIGITS, register_family
from training.experiments.miniature.cifar import CLASSES, SIZE, ImageSplit, export_folders
from training.experiments.miniature.make_cifar import RECIPES
from training.experiments.miniature.pretraining import (
    BaseRecipe,
    as_float,
    build_base,
    build_optimizers,
    build_scheduler,
    untie,
)

# Width 256, depth 8, tokens of 2 x 2: five million images, or as many as fit into the budget. One
# that was trained for longer can be carried along, see --base.
RECIPE = replace(
    RECIPES["cifar10"], patch_size=2, layers=8, heads=4, head_width=64, batch=512, steps=9800,
    muon_rate=0.01, adam_rate=2e-3, ema_decay=0.999,
)  # fmt: skip
TINY = replace(RECIPE, layers=2, heads=1, head_width=16, batch=8, steps=30, warmup=5)
MEASURED = 10  # steps whose time tells how many fit


def registered(recipe: BaseRecipe) -> str:
    """The name of the base in the tables of core and trainer."""
    side = recipe.size // recipe.patch_size
    base = bases.dit(
        f"cifar10-{recipe.layers}x{recipe.heads * recipe.head_width}",
        depth=recipe.layers,
        width=recipe.heads * recipe.head_width,
        patch_size=recipe.patch_size,
        in_channels=recipe.channels,
        frequency_shift=1.0,
        grid=(side, side),
    )
    register_family(register_base(base), DIGITS)
    return base.name


def image_folders(setup: Setup, out: Path) -> Path:
    """Folders of images by split and class, as the trainer reads them.

    Raises:
        FileNotFoundError: --data names no CIFAR-10, and the models are not tiny.
    """
    if setup.data is not None and (setup.data / "train").is_dir():
        return setup.data
    folder = out / f"images-{SIZE}"
    if setup.tiny and setup.data is None:
        _synthetic(folder)
    elif setup.data is None:
        raise FileNotFoundError(
            "expected CIFAR-10 for part 2, found none: give --data, a zip of class folders or the "
            "folders that `make_cifar folders` writes."
        )
    elif not (folder / "train").is_dir():
        export_folders(setup.data, folder)
    return folder


def _synthetic(folder: Path) -> None:
    """Smooth pictures, a colour for each class, to try the command with."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("validation", 2), ("test", 4)):
        for number, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for row in range(count):
                coarse = torch.rand(1, 3, 4, 4, generator=generator) + number / 10
                smooth = F.interpolate(coarse / 2, (SIZE, SIZE), mode="bilinear")[0]
                pixels = (smooth.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(place / f"{row}.png")


def pretrain(
    recipe: BaseRecipe,
    data: ImageSplit,
    device: torch.device,
    seconds: float,
    said: Callable[[str], None],
) -> DiTTransformer2DModel:
    """Trains a base for at most about these seconds; the constant part in bfloat16 on a GPU.

    Args:
        recipe: its steps are done where they fit; otherwise as many as do, annealed all the same.
    """
    # The annealing is in float32 with TF32 products, whose rounding is below the smallest losses.
    torch.set_float32_matmul_precision("high")
    run = _Run(recipe, data, device)
    start = time.monotonic()
    halves, wholes = run.measured(half=device.type == "cuda"), run.measured(half=False)
    each = (1 - recipe.annealed) * halves + recipe.annealed * wholes
    left = seconds - (time.monotonic() - start)
    steps = max(min(recipe.steps, int(left / each)), MEASURED)
    said(f"{steps} steps of {recipe.batch} images, {1e3 * halves:.1f} and {1e3 * wholes:.1f} ms")
    run.recipe = replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 10))
    loss = run.train(steps)
    torch.set_float32_matmul_precision("highest")
    said(f"training loss {loss:.5f} after {time.monotonic() - start:.0f} s")
    return untie(run.average.cpu())


class _Run:
    """A base being trained on a device."""

    def __init__(self, recipe: BaseRecipe, data: ImageSplit, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.scheduler = build_scheduler()
        self.alphas = self.scheduler.alphas_cumprod.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.model = build_base(recipe).to(device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = build_optimizers(self.model, recipe)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        if device.type == "cuda":
            for block in self.model.transformer_blocks:  # equal ones share what is compiled
                block.compile(dynamic=False)

    def measured(self, half: bool) -> float:
        """Seconds of a step once everything is compiled.

        The steps are those of the beginning of the warm-up, where rates are next to nothing.
        """
        for _ in range(3):
            self.step(0, half)
        start = self._now()
        for _ in range(MEASURED):
            self.step(0, half)
        return (self._now() - start) / MEASURED

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def train(self, steps: int) -> float:
        """All steps; returns the last training loss."""
        loss = torch.zeros(())
        for step in range(steps):
            half = self.device.type == "cuda" and step < self.recipe.constant_steps
            loss = self.step(step, half)
        return float(loss)

    def step(self, number: int, half: bool) -> Tensor:
        """One step of both optimisers; returns the loss, without waiting for it."""
        recipe, generator, device = self.recipe, self.generator, self.device
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * recipe.rate(number)
        count = recipe.batch
        rows = torch.randint(len(self.labels), (count,), generator=generator, device=device)
        images, labels = as_float(self.images[rows]), self.labels[rows]
        drawn = torch.rand(3, count, generator=generator, device=device)
        images = torch.where((drawn[0] < 0.5).reshape(-1, 1, 1, 1), images.flip(-1), images)
        labels = torch.where(drawn[1] < recipe.label_dropout, recipe.classes, labels)
        t = ((torch.arange(count, device=device) + drawn[2]) / count * 1000).long().clamp(max=999)
        noise = torch.randn(images.shape, generator=generator, device=device)
        alpha = self.alphas[t].reshape(-1, 1, 1, 1)
        noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            prediction = self.model(noisy, t, labels).sample
        loss = F.mse_loss(prediction.float(), noise)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        decay = min(recipe.ema_decay, (number + 1) / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )
        return loss.detach()
