"""Runs readers on hostile files in a process with a limit of time and memory."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30  # of one reader; most need milliseconds
MEGABYTES = 500  # above what the process has before it reads; most need none
_START = 120  # seconds to import torch on a busy machine

# A line asks for a reader and a file. The answer is the error's class and text, the seconds it
# took and the megabytes by which the process grew.
_SERVER = """
import json, sys, time
from tests.attacks.readers import READERS, Peak
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))  # spares the machine
except ImportError:
    pass
peak = Peak()
print("ready", file=sys.__stdout__, flush=True)
for line in sys.stdin:
    name, path = json.loads(line)
    peak.reset()
    before, start = peak.megabytes(), time.perf_counter()
    try:
        READERS[name](path)
        kind = text = ""
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    answer = kind, text, time.perf_counter() - start, peak.megabytes() - before
    print(json.dumps(answer), file=sys.__stdout__, flush=True)
"""


class Answer(NamedTuple):
    """What came of reading a file: the error's class (empty without one) and text, and its cost."""

    kind: str
    text: str
    seconds: float
    megabytes: float


class Server:
    """A process that reads hostile files; started again when one has brought it down."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def read(self, reader: str, path: Path) -> Answer:
        """Has a file read.

        Raises:
            AssertionError: the process crashed, or took too long.
        """
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        process.stdin.flush()
        line = self._line(2 * SECONDS)
        if not line:
            self.close()
            raise AssertionError(f"{reader} crashed or did not come to an end with {path}")
        return Answer(*json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._lines = queue.Queue()
            threading.Thread(target=self._forward, args=(self._process,), daemon=True).start()
            assert self._line(_START) == "ready\n", "the process did not start"
        return self._process

    def _forward(self, process: subprocess.Popen[str]) -> None:
        """Passes its lines on, so that waiting for one can have a limit."""
        assert process.stdout is not None
        lines = self._lines
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _line(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""
