"""What a patch costs in a forward pass: `python -m benchmarks.overhead --model sd15`.

Prints, for misses (first picture: every timestep is new) and hits (later pictures), the time inside
our hooks as a share of the forward pass, and the ratio of patched to plain forward passes, taken in
turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.models import dit, random_patch, sd15
from benchmarks.timing import CLOCKS, clocked, interleaved, ratio
from dmp_common import attach
from training.presets import STAGES


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sd15", "dit-b/2"], default="dit-b/2")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (sd15)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="timesteps of a picture")
    parser.add_argument("--rounds", type=int, default=10, help="pairs for the ratio")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--stages", action="store_true", help="a mixture of grids")
    options = parser.parse_args()
    variant = STAGES if options.stages else {}
    dtype, now = getattr(torch, options.dtype), CLOCKS[options.clock]
    with torch.no_grad():
        if options.model == "sd15":
            model, inputs = sd15(options.latent, options.batch)
        else:
            model, inputs = dit("b", options.batch)
        model = model.to(dtype).eval()
        patch = random_patch(options.model, **variant)
        name = options.model + (" stages" if variant else "")
        print(f"{name}, batch {options.batch}, {options.dtype}, CPU, "
              f"{torch.get_num_threads()} threads, {options.clock} clock, "
              f"torch {torch.__version__}")  # fmt: skip

        def forward(t: float) -> Any:
            given = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v
                     for k, v in inputs(t).items()}  # fmt: skip
            return model(**given)

        forward(1.0)
        with attach(model, random_patch(options.model, **variant)):
            forward(1.0)  # first use of everything, out of the measurement
        with attach(model, patch) as attachment, clocked(attachment, model, now) as clock:
            for kind in ("misses", "hits"):
                shares = []
                for step in range(options.steps):
                    t = 999.0 - step * 999.0 / options.steps
                    clock.seconds, start = 0.0, now()
                    forward(t)
                    shares.append(clock.seconds / (now() - start - clock.seconds))
                low, middle, high = statistics.quantiles(shares, n=4)
                print(f"time inside hooks, {kind}: {middle:.3%} of the plain forward "
                      f"(quartiles {low:.3%} to {high:.3%})")  # fmt: skip
            print(f"fields remembered: {patch.cache.bytes / 2**20:.0f} MiB")

        def patched() -> None:
            with attach(model, patch):
                forward(500.0)

        seconds = interleaved(
            {"plain": lambda: forward(500.0), "patched": patched}, options.rounds, now
        )
        middle, spread = ratio(seconds, "patched", "plain")
        print(f"patched / plain forward (hits): {middle:.4f} +- {spread:.4f}; "
              f"plain {statistics.median(seconds['plain']):.3f} s")  # fmt: skip


if __name__ == "__main__":
    main()
