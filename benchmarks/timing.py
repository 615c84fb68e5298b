"""Interleaved timing in one process, medians and their ratios."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dmp_common import Attachment


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that drifts of the machine hit all alike."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds):
        order = list(runs) if round_ % 2 == 0 else list(reversed(runs))
        for name in order:
            start = now()
            runs[name]()
            seconds[name].append(now() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> tuple[float, float]:
    """Median of the paired ratios, and half their interquartile range."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


# Processor time, for a busy machine: only with one thread, where nothing waits for another core.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


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

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
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
def clocked(
    attachment: Attachment, model: Any, now: Callable[[], float] = time.perf_counter
) -> Iterator[HookClock]:
    """Replaces the hooks of an attachment by timed ones for a while."""
    clock = HookClock(now)
    ours = {handle.id for handle in attachment._handles}
    replaced = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in ours & set(hooks):
                replaced.append((hooks, key, hooks[key]))
                hooks[key] = clock.wrap(hooks[key])
    assert len(replaced) == len(ours), "every hook is timed"
    try:
        yield clock
    finally:
        for hooks, key, hook in replaced:
            hooks[key] = hook
