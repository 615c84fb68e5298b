"""The figure of the study: what is left of the pictures' damage, against the size of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.experiments.cheap import comparisons as plan
from training.experiments.cheap.calls import EXACT
from training.experiments.cheap.measures import USUAL, CheapJob, Measures, Results
from training.experiments.miniature.plot import empty_figure

# What is drawn: how weights are rounded, what was added, and what the line is called.
_LINES = (
    ("rtn{}-group32", "none", "rounded to the nearest"),
    ("rtn{}-group32", "gptq", "rounded by GPTQ"),
    ("rtn{}-group32", "lora", "nearest, with a LoRA"),
    ("rtn{}-group32", "modulation", "nearest, with a patch (modulation layers)"),
    ("rtn{}-group32", "repair", "nearest, with a patch"),
    ("gptq{}-group32", "repair", "GPTQ, with a patch"),
)
_BITS = range(2, 9)


def draw_figure(results: Results, path: Path) -> None:
    """Draws a panel for each base: distance of pictures to the full model's over bytes, both on a
    logarithmic axis; means over seeds.

    Raises:
        PatchError: matplotlib is missing.
    """
    figure = empty_figure(path, 10, 4.2)
    panels = figure.subplots(1, len(plan.SUBJECTS), squeeze=False)[0]
    for panel, subject in zip(panels, plan.SUBJECTS, strict=True):
        _draw(panel, results, subject)
    panels[0].set_ylabel("squared distance of pictures\nto the full model's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def _draw(panel: Any, results: Results, subject: str) -> None:
    full = _means(results, subject, EXACT, "none")
    for number, (call, method, label) in enumerate(_LINES):
        points = []
        for bits in _BITS:
            found = _means(results, subject, call.format(bits), method)
            if found is not None:
                points.append((*found, bits))
        if not points:
            continue
        sizes, distances, bits_of = zip(*sorted(points), strict=True)
        panel.plot(sizes, distances, marker="o", color=f"C{number}", label=label)
        for size, distance, bits in zip(sizes, distances, bits_of, strict=True):
            panel.annotate(
                f"{bits}", (size, distance), textcoords="offset points", xytext=(4, 4),
                fontsize=7, color=f"C{number}",
            )  # fmt: skip
    if full is not None:
        panel.axvline(full[0], color="grey", linewidth=1, linestyle=":")
        panel.annotate("full", (full[0], panel.get_ylim()[0]), fontsize=7, color="grey")
    panel.set_yscale("log")
    panel.set_xlabel("KB: weights, scales and what was added")
    panel.set_title(f"{subject} (numbers: bits of a weight)", fontsize=10)


def _means(results: Results, subject: str, call: str, method: str) -> tuple[float, float] | None:
    """Bytes in thousands and mean distance of a model on the test split, where it was measured."""

    def fits(job: CheapJob) -> bool:
        return (job.subject, job.call, job.method, job.split) == (subject, call, method, "test")

    found: list[Measures] = [
        one for job, one in results.items()
        if fits(job) and job.use == USUAL and job.steps in (0, plan.STEPS)
    ]  # fmt: skip
    if not found:
        return None
    return found[0].stored_bytes / 1000, sum(one.pixels for one in found) / len(found)
