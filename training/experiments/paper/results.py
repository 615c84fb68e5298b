"""Results of all tables in one: our values beside the paper's, with the differences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.patch.serialize import write_atomically
from training.experiments.paper.cells import Cell, Table, read_table, table_names

FORMAT = 1
_MISSING = "-"


@dataclass(frozen=True)
class CellResult:
    """What an evaluation says of one model.

    Args:
        metrics: fid and others.
        loss: held-out denoising loss.
        samples: generated images.
        against_base: differences from the base, by measure.
    """

    metrics: dict[str, float]
    loss: float | None
    samples: int
    against_base: dict[str, dict[str, Any]]


Results = dict[tuple[str, str], CellResult]


def read_results(out: Path) -> Results:
    """All evaluations of a folder, by base and label; of several those of most samples, then the
    latest.

    Raises:
        PatchError: a file that is no evaluation.
    """
    found: Results = {}
    for path in sorted((out / "evaluations").glob("*/*/evaluation.json")):
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if contents["format"] != 1:
                raise ValueError(f"format {contents['format']}")
            for label, model in contents["models"].items():
                key = (path.parent.parent.name, label)
                result = _result(label, model, contents["differences"])
                if key not in found or result.samples >= found[key].samples:
                    found[key] = result
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PatchError(
                f"expected an evaluation of format 1 at {path}, found {error!r}: take the folder "
                "away and evaluate again."
            ) from error
    return found


def _result(label: str, model: dict[str, Any], differences: list[dict[str, Any]]) -> CellResult:
    against = {
        entry["measure"]: {name: entry[name] for name in ("mean", "low", "high", "n", "over")}
        for entry in differences
        if entry["model"] == label and entry["against"] == "base"
    }
    metrics = {name: float(value) for name, value in model["metrics"].items() if value is not None}
    return CellResult(metrics, model.get("loss"), int(model["samples"]), against)


def collect(out: Path) -> dict[str, Any]:
    """Writes paper.json and paper.md into the folder of results; returns what is in the first."""
    found = read_results(out)
    tables = [read_table(name) for name in table_names()]
    contents = {
        "format": FORMAT,
        "tables": {table.name: _table(table, found) for table in tables},
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(contents, indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "paper.json", text.encode())
    write_atomically(out / "paper.md", _markdown(contents).encode())
    return contents


def _table(table: Table, found: Results) -> dict[str, Any]:
    pictures = table.drawn in ("heatmaps", "samples")
    return {
        "title": table.title,
        "source": table.source,
        "cells": [] if pictures else [_cell(cell, found) for cell in table.cells],
    }


def _cell(cell: Cell, found: Results) -> dict[str, Any]:
    result = found.get((cell.base, cell.label))
    return {
        "id": cell.id,
        "base": cell.base,
        "method": cell.method,
        "step": cell.step,
        "x": cell.x,
        "reported": {"fid": cell.fid},
        "ours": None if result is None else result.metrics,
        "ours_minus_reported": _minus(None if result is None else result.metrics, cell.fid),
        "loss": None if result is None else result.loss,
        "samples": None if result is None else result.samples,
        "against_base": None if result is None else result.against_base,
        "note": cell.note,
    }


def _minus(ours: dict[str, float] | None, reported: float | None) -> dict[str, float] | None:
    """Our FID minus the paper's, where both are known."""
    if reported is None or ours is None or "fid" not in ours:
        return None
    return {"fid": ours["fid"] - reported}


def _markdown(contents: dict[str, Any]) -> str:
    lines = [
        "# The paper's tables",
        "",
        f"FID. {_MISSING} is a value that we do not have; *not found* one of the paper that we did "
        "not find. The last difference is to our base, with its 95 % interval.",
    ]
    for name, table in contents["tables"].items():
        if not table["cells"]:
            continue
        done = sum(cell["ours"] is not None for cell in table["cells"])
        lines += [
            "",
            f"## {name}: {table['title']}",
            "",
            f"{done} of {len(table['cells'])} cells. Reported: {table['source']}.",
            "",
            "| cell | base | method | steps | paper | ours | ours - paper | ours - our base "
            "| samples | |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_line(cell) for cell in table["cells"]),
        ]
    return "\n".join(lines) + "\n"


def _line(cell: dict[str, Any]) -> str:
    reported, ours = cell["reported"]["fid"], cell["ours"] or {}
    difference = (cell["against_base"] or {}).get("fid")
    from_paper = cell["ours_minus_reported"]
    words = [
        cell["id"].split("/")[1],
        cell["base"],
        cell["method"],
        str(cell["step"]),
        "*not found*" if reported is None else f"{reported:.2f}",
        f"{ours['fid']:.2f}" if "fid" in ours else _MISSING,
        _MISSING if from_paper is None else f"{from_paper['fid']:+.2f}",
        _MISSING
        if difference is None
        else f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]",
        _MISSING if cell["samples"] is None else str(cell["samples"]),
        cell["note"],
    ]
    return f"| {' | '.join(words)} |"
