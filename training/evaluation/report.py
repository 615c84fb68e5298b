"""The files of an evaluation: evaluation.json, evaluation.md, and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dmp_common.patch.serialize import write_atomically
from training.evaluation.closeness import closeness
from training.evaluation.comparison import Difference
from training.evaluation.controls import Controls
from training.evaluation.differences import Judged
from training.evaluation.markdown import as_markdown
from training.evaluation.models import TRAINING, Compared, base_parameters
from training.evaluation.plots import plot_losses, sample_grid
from training.evaluation.primary import primary_comparisons

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Args:
        base: the base's name.
        settings: what the figures depend on.
        reference: the label of what models are put on, as it is.
        judged: by label, the full model first.
        models: by label, one for each seed.
        stored: by label the bytes of the whole model.
        base_model: for its number of parameters.
    """

    base: str
    reference: str
    settings: Mapping[str, Any]
    controls: Controls
    judged: Mapping[str, Judged]
    models: Mapping[str, Sequence[Compared]]
    stored: Mapping[str, int]
    base_model: nn.Module
    differences: Sequence[Difference]


def write_report(report: Report, folder: Path) -> None:
    """Writes everything into a folder that exists.

    Raises:
        PatchError: matplotlib is missing; the figures are then on disk already.
    """
    data = write_json(report, folder)
    pictures = [(label, found.results[0].pictures) for label, found in report.judged.items()]
    drawn = bool(pictures[0][1])
    if drawn:
        sample_grid([images for _, images in pictures]).save(folder / "samples.png")
    columns = [label for label, _ in pictures] if drawn else []
    markdown = as_markdown(data, report.controls, report.differences, columns)
    write_atomically(folder / "evaluation.md", markdown.encode("utf-8"))
    plot_losses(report.judged, report.reference, report.differences, folder / "loss_by_bin.png")


def write_json(report: Report, folder: Path) -> dict[str, Any]:
    """Writes evaluation.json, and returns what is in it."""
    data = as_json(report)
    text = json.dumps(data, indent=2, allow_nan=False)
    write_atomically(folder / "evaluation.json", text.encode("utf-8"))
    return data


def as_json(report: Report) -> dict[str, Any]:
    """The content of evaluation.json."""
    close, models = closeness(report.judged), {}
    for label, found in report.judged.items():
        trained = [model for model in report.models[label] if model.spec.trained]
        first, losses = found.results[0], found.losses
        models[label] = {
            "method": found.method,
            "files": [model.spec.path for model in trained],
            "parameters": trained[0].parameters if trained else base_parameters(report.base_model),
            "trained": trained[0].trained if trained else dict.fromkeys(TRAINING),
            "loss": float(losses.mean()),
            "loss_by_bin": losses.mean(0).tolist(),
            "metrics": found.metrics,
            "samples": first.samples,
            "sampling": _sampling(found),
            "evaluations_per_picture": first.evaluations,
            "bytes_added": report.models[label][0].bytes_added,
            "bytes": report.stored[label],
            "to_full": {side: one.to_json() for side, one in close.get(label, {}).items()},
        }
    return {
        "format": FORMAT,
        "base": report.base,
        "reference": report.reference,
        "settings": dict(report.settings),
        "missing_controls": report.controls.missing,
        "models": models,
        "differences": [difference.to_json() for difference in report.differences],
        "primary": [one.to_json() for one in primary_comparisons(report.judged)],
    }


def _sampling(found: Judged) -> dict[str, Any]:
    """How the samples of a row were drawn; of epsilon scales one for each file."""
    choices = [result.choice for result in found.results]
    return {
        "steps": found.how.steps,
        "guidance_scale": found.how.scale,
        "sampler": found.how.sampler,
        "strength": found.spec.settings.strength,
        "quantization": found.spec.settings.quantization,
        "epsilon_scale": [result.epsilon for result in found.results],
        "epsilon_tried": [
            {f"{value:g}": distance for value, distance in choice.tried.items()}
            for choice in choices
            if choice is not None
        ],
        "epsilon_inside": all(choice is None or choice.inside for choice in choices),
    }
