"""What a patch costs in a forward pass: `python -m benchmarks.overhead --model sd15`.

Prints, for misses (first picture: every timestep is new) and hits (later pictures), the time inside
our hooks as a share of the forward pass, and the ratio of patched to plain forward passes, taken in
turns in one process. With `--device cuda` the clock waits for the GPU at both ends of a pass, while
the time inside our hooks is that of the processor alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn as nn

from benchmarks.models import MODELS, Inputs, build, random_patch
from benchmarks.timing import (
    CLOCKS,
    Clock,
    clock_of,
    clocked,
    interleaved,
    machine_of,
    ratio,
)
from dmp_common import Patch, attach
from training.options.presets import STAGES

KINDS = ("misses", "hits")
Forward = Callable[[float], torch.Tensor]


def caller(model: Any, inputs: Inputs) -> Forward:
    """Calls a model at a timestep without gradients; all other inputs are made beforehand."""
    given = inputs(500.0)

    def forward(t: float) -> torch.Tensor:
        changed = {**given, "timestep": given["timestep"] * (t / 500.0)}
        with torch.no_grad():
            output: torch.Tensor = model(**changed, return_dict=False)[0]
        return output

    return forward


def hook_shares(
    model: nn.Module, patch: Patch, forward: Forward, steps: int, clock: Clock, hooks: Clock
) -> dict[str, list[float]]:
    """Time inside our hooks over the rest of the forward pass, for misses and for hits.

    Args:
        forward: calls the model at a timestep.
        steps: timesteps of a picture.
        clock: for the whole forward pass.
        hooks: for the time inside our hooks.
    """
    patch.cache.clear()
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with clocked(model, patch, hooks) as inside:
        for found in shares.values():
            for step in range(steps):
                inside.seconds, start = 0.0, clock()
                forward(999.0 - step * 999.0 / steps)
                found.append(inside.seconds / (clock() - start - inside.seconds))
    return shares


def forward_seconds(
    model: nn.Module, patch: Patch, forward: Forward, rounds: int, clock: Clock, passes: int = 1
) -> dict[str, list[float]]:
    """Seconds of plain passes, of patched hits and of patched misses, taken in turns.

    Args:
        passes: forward passes of one measurement. With several, a GPU is kept busy as it is while
            a picture is sampled.
    """
    new = count()

    def known() -> None:
        for _ in range(passes):
            forward(500.0)

    def unknown() -> None:
        for _ in range(passes):
            forward(1.0 + next(new) / 16.0)

    def patched() -> Any:
        return attach(model, patch)

    runs = {"plain": known, "hits": known, "misses": unknown}
    return interleaved(runs, rounds, clock, {"hits": patched, "misses": patched})


def options_of_command_line() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="dit-b/2")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (not for DiT)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="timesteps of a picture")
    parser.add_argument("--rounds", type=int, default=10, help="measurements for the ratio")
    parser.add_argument("--passes", type=int, default=1, help="forward passes of a measurement")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stages", action="store_true", help="a mixture of grids")
    which.add_argument("--modulate", metavar="SET", help="scale and shift these outputs: linear")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark of the command line."""
    options = options_of_command_line()
    dtype = getattr(torch, options.dtype)
    clock = clock_of(options.device, options.clock)
    model, inputs = build(options.model, options.latent, options.batch, options.device, dtype)
    variant = STAGES if options.stages else {}
    if options.modulate:
        variant = {"mix": "modulate", "sites": options.modulate}
    patch = random_patch(options.model, **variant).to(options.device)
    name = " ".join([options.model, *map(str, variant.values())] if variant else [options.model])
    print(f"{name}, batch {options.batch}, {options.dtype}, {machine_of(options.device)}, "
          f"{options.clock} clock, torch {torch.__version__}")  # fmt: skip

    forward = caller(model, inputs)
    with attach(model, patch):
        forward(1.0)  # first use of everything, out of the measurement
    forward(1.0)
    hooks = CLOCKS[options.clock]
    shares = hook_shares(model, patch, forward, options.steps, clock, hooks)
    for kind, found in shares.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"time inside hooks, {kind}: {middle:.3%} of the plain forward "
              f"(quartiles {low:.3%} to {high:.3%})")  # fmt: skip
    print(f"fields remembered: {patch.cache.bytes / 2**20:.0f} MiB")
    seconds = forward_seconds(model, patch, forward, options.rounds, clock, options.passes)
    for kind in reversed(KINDS):
        middle, spread = ratio(seconds, kind, "plain")
        plain = statistics.median(seconds["plain"]) / options.passes
        print(f"patched / plain forward ({kind}): {middle:.4f} +- {spread:.4f}; "
              f"plain {plain:.3f} s")  # fmt: skip


if __name__ == "__main__":
    main()
