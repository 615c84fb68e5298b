"""Interleaved timing in one process, medians and their ratios."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from dmp_common import Patch, attach

Clock = Callable[[], float]


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    now: Clock = time.perf_counter,
    around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Measures the runs in turns, so that drifts of the machine hit all of them alike.

    Args:
        runs: what is measured, by name. Each runs once before the first measurement.
        rounds: measurements of each run.
        now: the clock.
        around: a context manager for some of the runs; entering and leaving it is not timed.

    Returns:
        The seconds of each run, one number for each round.
    """
    around = around or {}

    def timed(name: str) -> float:
        with around.get(name, nullcontext)():
            start = now()
            runs[name]()
            return now() - start

    for name in runs:
        timed(name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds):
        order = list(runs) if round_ % 2 == 0 else list(reversed(runs))
        for name in order:
            seconds[name].append(timed(name))
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> tuple[float, float]:
    """Median of the paired ratios, and half their interquartile range."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


# Processor time, for a busy machine: only with one thread, where nothing waits for another core.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def clock_of(device: torch.device | str, name: str = "wall") -> Clock:
    """The clock for runs on a device; on a GPU it waits until the GPU has done all its work."""
    clock = CLOCKS[name]
    if torch.device(device).type != "cuda":
        return clock

    def now() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return now


def machine_of(device: torch.device | str) -> str:
    """The processor that a benchmark runs on, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def host_options(about: str) -> argparse.Namespace:
    """The command line of the benchmarks inside hosts."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--latent", type=int, default=32, help="side of the latent")
    parser.add_argument("--steps", type=int, default=4, help="timesteps of a picture")
    parser.add_argument("--rounds", type=int, default=10, help="pairs for the ratio")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    return parser.parse_args()


class HookClock:
    """Adds up the time spent inside our hooks while it is on."""

    def __init__(self, now: Clock = time.perf_counter) -> None:
        self.seconds = 0.0
        self.now = now

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same hook, with its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.now() - start

        return timed


@contextmanager
def clocked(model: Any, patch: Patch, now: Clock = time.perf_counter) -> Iterator[HookClock]:
    """Attaches a patch to a model, and measures the time inside the hooks that this adds."""
    clock = HookClock(now)
    before = {(place, key) for place, hooks in _hooks(model) for key in hooks}
    with attach(model, patch):
        found = 0
        for place, hooks in _hooks(model):
            for key in [key for key in hooks if (place, key) not in before]:
                hooks[key] = clock.wrap(hooks[key])
                found += 1
        assert found, "attaching a patch adds hooks"
        yield clock


def _hooks(model: Any) -> Iterator[tuple[int, dict[int, Callable[..., Any]]]]:
    """All hooks of a model's modules, with a number for the place that they are in."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield id(hooks), hooks
