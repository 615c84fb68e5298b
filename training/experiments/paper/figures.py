"""The paper's figures: lines of FID, gates of patches by timestep, samples side by side."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from training.experiments.paper.cells import Cell, Table
from training.experiments.paper.experiment import Experiment
from training.experiments.paper.runner import gate_picture


def require_matplotlib() -> None:
    """Says before training that nothing could be drawn after it.

    Raises:
        PatchError: the package is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PatchError(
            "expected the package matplotlib to draw figures, found none: pip install matplotlib."
        ) from error


def draw_lines(table: Table, cells: list[dict[str, Any]], out: Path) -> Path:
    """FID over steps or blocks: ours as lines, the paper's numbers as crosses.

    Args:
        table: a figure of lines.
        cells: of `results.collect`; where nothing is evaluated only the paper's are drawn.
        out: folder of results.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    assert table.figure is not None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, (method, series) in enumerate(_series(cells).items()):
        colour = f"C{number}"
        ours = [(c["x"], c["ours"]["fid"]) for c in series if "fid" in (c["ours"] or {})]
        reported = [(c["x"], c["reported"]["fid"]) for c in series]
        axes.plot(*_columns(ours), marker="o", color=colour, label=method)
        axes.plot(*_columns([(x, y) for x, y in reported if y is not None]), "x", color=colour)
    axes.plot([], [], "x", color="grey", label="paper")
    axes.set(xlabel=table.figure.x, ylabel="FID", title=table.title)
    axes.legend()
    path = out / "figures" / f"{table.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _series(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells by method; each line begins at the base."""
    base = [cell for cell in cells if cell["method"] == "base"]
    series: dict[str, list[dict[str, Any]]] = defaultdict(lambda: list(base))
    for cell in cells:
        if cell["method"] != "base":
            series[cell["method"]].append(cell)
    return {
        name: sorted(members, key=lambda cell: float(cell["x"])) for name, members in series.items()
    }


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def copy_heatmaps(experiment: Experiment, table: Table, cells: list[Cell]) -> list[Path]:
    """Puts the gate pictures, which the trainer draws with every file, together.

    Raises:
        PatchError: one is missing.
    """
    folder = experiment.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for cell in cells:
        picture = gate_picture(experiment.checkpoint(cell))
        if not picture.is_file():
            raise PatchError(
                f"expected the gate of {cell.id} at {picture}, found none: draw it with python -m "
                "dmp_common heatmap."
            )
        copies.append(folder / f"{table.name}-{cell.id.split('/')[1]}.png")
        shutil.copyfile(picture, copies[-1])
    return copies


def copy_samples(experiment: Experiment, table: Table, pictures: Mapping[str, Path]) -> list[Path]:
    """Puts the samples of all bases together.

    Args:
        pictures: by the name of the base.
    """
    folder = experiment.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / f"{table.name}-{base}.png" for base in pictures]
    for picture, copy in zip(pictures.values(), copies, strict=True):
        shutil.copyfile(picture, copy)
    return copies
