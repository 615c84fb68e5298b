"""What loading costs: `python -m benchmarks.data_loader`.

Prints, for each way to load, how long a training step waits for its batch, and the share of that
in the whole step. Latents and text outputs have the sizes of SD 1.5 at 512 px. The step is a
patch's training step of DiT-B/2, measured here, or `--step_seconds` of your own (SD 1.5's takes
longer: the share is then smaller).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.models import dit
from benchmarks.training_step import Patched
from dmp_common import Patch
from training.data.build import DataKind, open_data
from training.options.data_options import DataOptions

SIDE, LATENT, TOKENS, WIDTH = 512, 64, 77, 768  # SD 1.5
WAYS: dict[str, tuple[dict[str, bool], int]] = {
    "caches on disk": ({"cache_latents_to_disk": True,
                        "cache_text_encoder_outputs_to_disk": True}, 0),
    "caches on disk, 1 worker": ({"cache_latents_to_disk": True,
                                  "cache_text_encoder_outputs_to_disk": True}, 1),
    "caches in memory": ({"cache_latents": True, "cache_text_encoder_outputs": True}, 0),
    "no cache (images only)": ({}, 0),
    "no cache (images only), 1 worker": ({}, 1),
}  # fmt: skip


class Encoders:
    """Outputs of the right sizes."""

    image_fingerprint = text_fingerprint = "benchmark"

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Moments."""
        return torch.randn(len(pixels), 8, LATENT, LATENT)

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Hidden states."""
        return {"hidden": torch.randn(len(captions), TOKENS, WIDTH)}


def make_images(folder: Path, count: int) -> None:
    """Photograph-like JPEG files with captions."""
    for n in range(count):
        coarse = np.random.default_rng(n).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((768, 640), Image.Resampling.BICUBIC).save(
            folder / f"{n:04d}.jpg", quality=92
        )
        (folder / f"{n:04d}.txt").write_text(f"picture number {n}", encoding="utf-8")


def waits(batches: Iterator[Any], step: Callable[[], Any], count: int) -> list[float]:
    """Seconds that each of `count` steps waits for its batch."""
    next(batches)
    seconds = []
    for _ in range(count):
        step()
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    return seconds


def training_step(batch: int) -> Callable[[], None]:
    """A patch's training step of DiT-B/2."""
    model, inputs = dit("b", batch)
    model = model.eval().requires_grad_(False)
    patch = Patch.create("dit-b/2")
    patch.scale_for_learning()
    return Patched(model, {**inputs(500.0), "timestep": torch.linspace(20.0, 980.0, batch)}, patch)


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="steps for each way to load")
    parser.add_argument("--step_seconds", type=float, help="of a step; default: DiT-B/2, measured")
    options = parser.parse_args()
    if options.step_seconds is None:
        step = training_step(options.batch)
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    else:
        seconds = options.step_seconds

        def step() -> None:
            time.sleep(min(seconds, 0.5))  # workers load ahead meanwhile

    print(f"batch {options.batch}, step {seconds:.3f} s, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), options.images)
        for name, (caches, workers) in WAYS.items():
            given = DataOptions(train_data_dir=folder, resolution=str(SIDE), **caches)
            data = open_data(given, DataKind("caption"), seed=0, split="train")
            data.prepare_caches(Encoders())
            batches = data.batches(global_batch=options.batch, workers=workers)
            waited = statistics.median(waits(batches, step, options.steps))
            print(f"{name}: waits {1000 * waited:.2f} ms, "
                  f"{waited / (waited + seconds):.2%} of a step")  # fmt: skip


if __name__ == "__main__":
    main()
