"""What a run says before its first step: what is done, how far it is, how long it took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

_PATIENCE = 2.0  # seconds after which a user wants to know what is going on
_EVERY = 10.0  # seconds between signs of life


class Telling:
    """Lines on the screen of the first process of a machine.

    Args:
        accelerator: knows which process that is.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.shown = accelerator.is_local_main_process
        self._told = 0.0

    def say(self, text: str) -> None:
        """Prints a line, or several."""
        if self.shown:
            print(text, flush=True)

    def progress(self, what: str, done: int, count: int) -> None:
        """Tells how far something is, on one line that is written again and again."""
        now = time.monotonic()
        if self.shown and (done >= count or now - self._told > 0.1):
            self._told = now
            print(f"\r{what}: {done} of {count}", end="\n" if done >= count else "", flush=True)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Says what is being done and, at its end, how long it took; meanwhile signs of life."""
        if not self.shown:
            yield
            return
        start, ended = time.monotonic(), threading.Event()

        def alive() -> None:
            wait = _PATIENCE
            while not ended.wait(wait):
                print(f"{what}: {time.monotonic() - start:.0f} s so far", flush=True)
                wait = _EVERY

        watch = threading.Thread(target=alive, daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()
        print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
