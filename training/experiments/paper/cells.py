"""The cells of the paper's tables and figures, read from TOML and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from training.options.problems import ConfigError
from training.options.toml_files import read_toml_file

HERE = Path(__file__).resolve().parent
Method = Literal["base", "dmp", "prompt", "lora", "full", "joint"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Untrained(_Strict):
    """A base of random weights: its classes (0 for none) or size of pooled text, its schedule."""

    classes: int = 0
    text: int | None = None
    schedule: Literal["linear", "cosine"]


class Base(_Strict):
    """A model, its data set, and how it is evaluated (see setup.toml)."""

    dataset: str
    options: dict[str, Any]
    evaluation: dict[str, Any] = {}
    untrained: Untrained | None = None
    note: str = ""


class Setup(_Strict):
    """What the cells have in common."""

    training: dict[str, Any]
    evaluation: dict[str, Any]
    datasets: dict[str, dict[str, Any]]
    bases: dict[str, Base]


class _CellEntry(_Strict):
    id: str
    base: str
    method: Method
    step: int | list[int] = 0
    options: dict[str, Any] = {}
    fid: float | dict[int, float] | None = None
    x: float | None = None
    note: str = ""


class Figure(_Strict):
    """What is drawn of a table: lines of FID, the gates of its patches, or samples side by side."""

    kind: Literal["lines", "heatmaps", "samples"]
    x: str = ""


class _TableFile(_Strict):
    title: str
    source: str
    cells: list[_CellEntry]
    figure: Figure | None = None


@dataclass(frozen=True)
class Cell:
    """One number of the paper.

    Args:
        id: of the cell, table/name.
        base: key of a base in setup.toml.
        method: "base" for the base as it is.
        step: optimiser steps; 0 for the base.
        options: of the trainer, besides those of the setup and the base.
        fid: what the paper reports; None where it was not found.
        x: place in a figure.
        note: what a reader should know.
    """

    id: str
    base: str
    method: Method
    step: int
    options: dict[str, Any] = field(hash=False)
    fid: float | None
    x: float
    note: str

    @property
    def run(self) -> str:
        """Name of the training run; cells of equal training share it, whatever their step."""
        changed = [f"{name}-{self.options[name]}" for name in sorted(self.options)]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([self.base, self.method, *changed]))

    @property
    def label(self) -> str:
        """Name of the model in evaluations."""
        return "base" if self.method == "base" else f"{self.run}-step{self.step}"


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper."""

    name: str
    title: str
    source: str
    cells: tuple[Cell, ...]
    figure: Figure | None

    @property
    def drawn(self) -> str | None:
        """The kind of its figure; None for a table without one."""
        return None if self.figure is None else self.figure.kind


def read_setup() -> Setup:
    """What the cells have in common."""
    return Setup(**read_toml_file(HERE / "setup.toml"))


def table_names() -> list[str]:
    """Names of all tables and figures."""
    return sorted(path.stem for path in (HERE / "tables").glob("*.toml"))


def read_table(name: str) -> Table:
    """One table or figure, a cell for every step.

    Raises:
        ConfigError: no such table, or a mistake in its file.
    """
    if name not in table_names():
        raise ConfigError(f"expected one of {', '.join(table_names())}, found {name!r}")
    path = HERE / "tables" / f"{name}.toml"
    try:
        file = _TableFile(**read_toml_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    cells = tuple(cell for entry in file.cells for cell in _cells(name, entry))
    return Table(name, file.title, file.source, cells, file.figure)


def choose(table: Table, only: list[str]) -> list[Cell]:
    """The cells of a table, or those of these ids (with or without the table's name).

    Raises:
        ConfigError: an id that the table does not have.
    """
    if not only:
        return list(table.cells)
    known = {cell.id: cell for cell in table.cells}
    wanted = [name if "/" in name else f"{table.name}/{name}" for name in only]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"expected a cell of {table.name}: {', '.join(known)}; found {name}")
    return [known[name] for name in wanted]


def _cells(table: str, entry: _CellEntry) -> list[Cell]:
    several = isinstance(entry.step, list)
    steps: list[int] = entry.step if isinstance(entry.step, list) else [entry.step]
    if (entry.method == "base") != (steps == [0]):
        raise ConfigError(f"{table}/{entry.id}: expected steps, or method base without, found both")
    return [
        Cell(
            id=f"{table}/{entry.id}" + (f"-{step // 1000}k" if several else ""),
            base=entry.base,
            method=entry.method,
            step=step,
            options=entry.options,
            fid=entry.fid.get(step) if isinstance(entry.fid, dict) else entry.fid,
            x=float(step) if entry.x is None else entry.x,
            note=entry.note,
        )
        for step in steps
    ]
