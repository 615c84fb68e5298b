"""The five seeds of a study as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from training.experiments.miniature.study_tables import columns
from training.experiments.miniature.trial import TrialMeasures
from training.objective.intervals import t_interval


def empty_figure(path: Path, width: float, height: float) -> Any:
    """A figure of matplotlib for a file, its sides in inches.

    Raises:
        PatchError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PatchError(
            f"expected the package matplotlib for {path.name}, found none: pip install matplotlib."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_confirmation(
    base: TrialMeasures, found: Mapping[str, Sequence[TrialMeasures]], path: Path, title: str
) -> None:
    """Change of the loss against Frechet distance, a panel for each sampler.

    Every seed is a dot, the cross their mean with 95 % intervals (Student's t); the base is where
    the grey lines meet, and lower left is better.

    Raises:
        PatchError: matplotlib is missing.
    """
    figure = empty_figure(path, 5 * len(base.frechet), 4.5)
    figure.suptitle(title)
    panels = figure.subplots(1, len(base.frechet), squeeze=False)[0]
    for number, (panel, sampler) in enumerate(zip(panels, base.frechet, strict=True)):
        panel.axvline(0, color="grey", linewidth=1)
        panel.axhline(base.frechet[sampler], color="grey", linewidth=1)
        for row, (name, several) in enumerate(found.items()):
            of_all = columns(base, several)
            losses, distances = 100 * of_all[0], of_all[2 + number]
            across, up = t_interval(losses), t_interval(distances)
            panel.scatter(losses, distances, s=12, alpha=0.4, color=f"C{row}", linewidths=0)
            panel.errorbar(
                across[0], up[0], xerr=across[2] - across[0], yerr=up[2] - up[0],
                marker="o", capsize=3, color=f"C{row}", label=name,
            )  # fmt: skip
        panel.set_xlabel("change of the held-out loss, %")
        panel.set_ylabel(f"Frechet distance, {sampler}")
    panels[-1].legend()
    figure.savefig(path, dpi=100)
