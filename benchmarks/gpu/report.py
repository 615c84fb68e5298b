"""The report of a run: figures and failures, written again after every part."""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import diffusers
import torch

from benchmarks.timing import machine_of

Value = float | bool | str


@dataclass(frozen=True)
class Figure:
    """What was measured.

    Args:
        what: in words.
        value: a number, whether something holds, or words.
        note: the spread, the unit, or what to compare with.
        most: the largest number that is good enough; None where nothing was promised.
        good: whether the value is what was promised; None where nothing was promised.
    """

    what: str
    value: Value
    note: str = ""
    most: float | None = None
    good: bool | None = None

    def cells(self) -> list[str]:
        """The figure as the cells of a table."""
        promise = "" if self.most is None else f"at most {self.most:g}"
        verdict = {None: "", True: "good", False: "**not good**"}[self.good]
        return [self.what, shown(self.value), self.note, promise, verdict]


def shown(value: Value) -> str:
    """A value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"


@dataclass
class Part:
    """One part of the run: its figures, and the failure that ended it.

    An error ends the part, not the run. An interrupt by the user ends the run.
    """

    name: str
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0
    failure: str | None = None
    budget: float | None = None
    start: float = field(default=0.0, repr=False)

    def add(self, what: str, value: Value, note: str = "", most: float | None = None) -> None:
        """Records a figure that is good up to a number, and prints it."""
        good = None if most is None or not isinstance(value, (int, float)) else value <= most
        self._record(Figure(what, value, note, most, good))

    def hold(self, what: str, value: bool, note: str = "") -> None:
        """Records whether something holds that must hold, and prints it."""
        self._record(Figure(what, value, note, good=value))

    def _record(self, figure: Figure) -> None:
        self.figures.append(figure)
        print("  " + " | ".join(cell for cell in figure.cells() if cell), flush=True)

    def __enter__(self) -> Part:
        print(f"{self.name}:", flush=True)
        self.start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.seconds = time.perf_counter() - self.start
        if not isinstance(error, Exception):
            return False
        lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
        self.failure = "\n".join(lines[-12:])
        print(f"  FAILED: {lines[-1]}", flush=True)
        return True


@dataclass
class Report:
    """All parts of a run on a device.

    Args:
        folder: where report.md and report.json are written.
        device: that was measured.
        about: the device and the versions, by name.
        parts: that ran.
        left_out: names of the parts that did not run, for want of time or of a GPU.
        lost: the error that made the GPU useless to this process, empty without one.
    """

    folder: Path
    device: str
    about: dict[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lost: str = ""

    def __post_init__(self) -> None:
        self.about = {
            "device": machine_of(self.device),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        }

    def run(self, name: str, part: Callable[[Part], Any], budget: float | None = None) -> None:
        """Runs a part and writes the report.

        Args:
            budget: seconds that it should take; None where nothing is expected.
        """
        with Part(name, budget=budget) as running:
            self.parts.append(running)
            part(running)
        self.write()

    def write(self) -> None:
        """Writes both files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = [{k: v for k, v in asdict(p).items() if k != "start"} for p in self.parts]
        data = {"about": self.about, "parts": parts, "left_out": self.left_out, "lost": self.lost}
        text = json.dumps(data, indent=1, default=str)
        (self.folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (self.folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = ", ".join(f"{name} {value}" for name, value in self.about.items())
        failed = [part.name for part in self.parts if part.failure]
        bad = [f"{p.name}: {f.what}" for p in self.parts for f in p.figures if f.good is False]
        lines = ["# GPU report", "", facts, ""]
        for title, names in (
            ("Failed", failed),
            ("Not good", bad),
            ("Did not run", self.left_out),
            ("The GPU was lost", [self.lost] if self.lost else []),
        ):
            lines += [f"{title}: {'; '.join(names) or 'nothing'}.", ""]
        lines += ["| part | what | measured | note | promised | verdict |", "|---|" + "---|" * 5]
        for part in self.parts:
            for figure in part.figures:
                cells = [cell.replace("|", "\\|") for cell in (part.name, *figure.cells())]
                lines.append("| " + " | ".join(cells) + " |")
        for part in self.parts:
            if part.failure:
                lines += ["", f"## {part.name} failed", "", "```", part.failure, "```"]
        lines += ["", "Seconds: " + ", ".join(_seconds(part) for part in self.parts)]
        return "\n".join(lines) + "\n"


def _seconds(part: Part) -> str:
    over = part.budget is not None and part.seconds > part.budget
    return f"{part.name} {part.seconds:.0f}" + (f" (of {part.budget:.0f})" if over else "")
