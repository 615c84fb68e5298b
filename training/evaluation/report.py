"""The files of an evaluation: evaluation.json, evaluation.md, and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dmp_common.patch.serialize import write_atomically
from training.evaluation.comparison import Difference
from training.evaluation.controls import Controls
from training.evaluation.differences import Judged
from training.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from training.evaluation.models import Compared, base_parameters
from training.evaluation.plots import plot_losses, sample_grid
from training.evaluation.spec import BASE

FORMAT = 1
_NAMES = {
    "loss": "held-out loss",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
}


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Args:
        base: the base's name.
        settings: what the figures depend on.
        judged: by label, the base first.
        models: the trained models by label, one for each seed.
        base_model: for its number of parameters.
    """

    base: str
    settings: Mapping[str, Any]
    controls: Controls
    judged: Mapping[str, Judged]
    models: Mapping[str, Sequence[Compared]]
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
    markdown = as_markdown(report, data, [label for label, _ in pictures] if drawn else [])
    write_atomically(folder / "evaluation.md", markdown.encode("utf-8"))
    plot_losses(report.judged, report.differences, folder / "loss_by_bin.png")


def write_json(report: Report, folder: Path) -> dict[str, Any]:
    """Writes evaluation.json, and returns what is in it."""
    data = as_json(report)
    text = json.dumps(data, indent=2, allow_nan=False)
    write_atomically(folder / "evaluation.json", text.encode("utf-8"))
    return data


def as_json(report: Report) -> dict[str, Any]:
    """The content of evaluation.json."""
    models = {}
    for label, found in report.judged.items():
        files = report.models.get(label, ())
        losses = found.losses
        models[label] = {
            "method": found.method,
            "files": [model.spec.path for model in files],
            "parameters": files[0].parameters if files else base_parameters(report.base_model),
            "trained": files[0].trained if files else dict.fromkeys(_TRAINED),
            "loss": float(losses.mean()),
            "loss_by_bin": losses.mean(0).tolist(),
            "metrics": found.metrics,
            "samples": found.results[0].samples,
        }
    return {
        "format": FORMAT,
        "base": report.base,
        "settings": dict(report.settings),
        "missing_controls": report.controls.missing,
        "models": models,
        "differences": [difference.to_json() for difference in report.differences],
    }


_TRAINED = ("learning_rate", "ema_decay", "steps")


def as_markdown(report: Report, data: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The content of evaluation.md.

    Args:
        data: from `as_json`.
        columns: of samples.png; none without samples.
    """
    settings, models = data["settings"], data["models"]
    lines = [f"# Evaluation on base {report.base}", ""]
    if report.controls.text:
        lines += [f"**{report.controls.text}**", ""]
    lines += [_about(settings), "", *_values(models), ""]
    for name, why in settings["not_computed"].items():
        lines.append(f"- {_NAMES[name]} was not computed: {why}.")
    lines += ["", "## Models", "", *_trained(models), "", "## Differences", ""]
    lines += _differences(report.differences)
    lines += ["", "## Loss by timestep", "", "![loss](loss_by_bin.png)", "", *_bins(models)]
    if columns:
        lines += ["", "## Samples", "", "![samples](samples.png)", ""]
        lines.append(f"Columns: {', '.join(columns)}. Every row is from the same noise.")
    return "\n".join(lines) + "\n"


def _about(settings: Mapping[str, Any]) -> str:
    loss = (
        f"Loss: {settings['images']} held-out images ({settings['split']}), "
        f"{settings['loss_draws']} noises for each and range of timesteps, the same for all models."
    )
    if not settings["samples"]:
        return loss
    against = "training" if settings["reference"] == "train" else "held-out"
    features = f"features: {settings['features']}" if settings["features"] else "no features"
    channels = settings["guided_channels"]
    of = "" if channels is None else f" of {channels} channels"
    return (
        f"{loss} Samples: {settings['samples']} from equal noise, {settings['sample_steps']} steps "
        f"({settings['sampler']}), guidance {settings['guidance_scale']:g}{of}, seed "
        f"{settings['seed']}; compared with {settings['reference_images']} {against} images "
        f"({features})."
    )


def _values(models: Mapping[str, Any]) -> list[str]:
    names = [name for name in METRICS if name in models[BASE]["metrics"]]
    titles = [f"{_NAMES[n]} {'↑' if n in HIGHER_IS_BETTER else '↓'}" for n in ("loss", *names)]
    lines = [_row(["model", *titles]), _row(["---"] * (len(titles) + 1))]
    for label, model in models.items():
        values = [f"{model['loss']:.5f}"]
        for name in names:
            text = f"{model['metrics'][name]:.4g}"
            if name == "kid":
                text += f" ± {model['metrics']['kid_std']:.2g}"
            values.append(text)
        lines.append(_row([label, *values]))
    return lines


def _trained(models: Mapping[str, Any]) -> list[str]:
    titles = ["model", "method", "seeds", "parameters", "learning rate", "EMA", "steps"]
    lines = [_row(titles), _row(["---"] * len(titles))]
    for label, model in models.items():
        told = [_told(model["trained"][name]) for name in _TRAINED]
        seeds = str(len(model["files"]) or "")
        lines.append(_row([label, model["method"], seeds, f"{model['parameters']:,}", *told]))
    return lines


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _differences(found: Sequence[Difference]) -> list[str]:
    over = (
        "Intervals are 95 %, each by itself. Over images: held-out images with equal noise; over "
        "samples: generated images from equal noise. These two are about the files at hand. Over "
        "seeds: trainings repeated; only this is about the method. Bold: the interval excludes 0."
    )
    titles = ["model - against", "measure", "difference", "95 % interval", "n", "over"]
    lines = [over, "", _row(titles), _row(["---"] * len(titles))]
    for one in found:
        if one.measure.startswith("loss_bin_"):
            continue  # in the picture
        mean = f"{one.mean:+.3g}"
        lines.append(
            _row(
                [
                    f"{one.model} - {one.against}",
                    _NAMES[one.measure],
                    f"**{mean}**" if one.excludes_zero else mean,
                    f"{one.low:+.3g} to {one.high:+.3g}",
                    str(one.n),
                    one.over,
                ]
            )
        )
    return lines


def _bins(models: Mapping[str, Any]) -> list[str]:
    bins = len(models[BASE]["loss_by_bin"])
    lines = [_row(["timesteps", *models]), _row(["---"] * (len(models) + 1))]
    for number in range(bins):
        first, last = 1000 * number // bins, 1000 * (number + 1) // bins - 1
        losses = [f"{model['loss_by_bin'][number]:.5f}" for model in models.values()]
        lines.append(_row([f"{first}-{last}", *losses]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
