"""The files of an evaluation: evaluation.json, evaluation.md, and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dmp_common import PatchError
from dmp_common.patch.serialize import write_atomically
from training.evaluation.comparison import Difference
from training.evaluation.controls import Controls
from training.evaluation.differences import Judged
from training.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from training.evaluation.models import Compared, base_parameters
from training.evaluation.spec import BASE
from training.objective.pictures import as_image

FORMAT = 1
_SMALLEST = 64  # pixels of a side in the grid of samples
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
    plot_losses(report, folder / "loss_by_bin.png")


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


def plot_losses(report: Report, path: Path) -> None:
    """The loss by timestep, and below its difference to the base with intervals over images.

    Raises:
        PatchError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PatchError(
            "expected the package matplotlib for loss_by_bin.png, found none: pip install "
            "matplotlib; the figures themselves are written."
        ) from error
    base = report.judged[BASE].losses.mean(0).tolist()
    bins = len(base)
    middles = [1000 * (number + 0.5) / bins for number in range(bins)]
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for label, found in report.judged.items():
        above.plot(middles, found.losses.mean(0).tolist(), marker="o", label=label)
    above.set_yscale("log")
    above.set_ylabel("held-out loss")
    above.legend()
    below.axhline(0, color="grey", linewidth=1)
    below.plot([], [])  # the base's colour
    for label in list(report.judged)[1:]:
        of_bins = [
            one
            for one in report.differences
            if one.model == label and one.against == BASE and one.measure.startswith("loss_bin_")
        ]
        means = [100 * one.mean / loss for one, loss in zip(of_bins, base, strict=True)]
        # The interval is symmetric: it is Student's.
        reach = [
            100 * (one.high - one.mean) / loss for one, loss in zip(of_bins, base, strict=True)
        ]
        below.errorbar(middles, means, yerr=reach, marker="o", capsize=3, label=label)
    below.set_ylabel("difference to the base, % of its loss\n(95 % intervals over images)")
    below.set_xlabel("timestep (0 is the picture)")
    figure.savefig(path, dpi=120)


def sample_grid(columns: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Rows of pictures from equal noise, one column a model, the base first.

    Args:
        columns: pictures (C, H, W) in [-1, 1]; those of another size than the first are left out.
    """
    shape = columns[0][0].shape
    factor = max(1, _SMALLEST // shape[1])
    rows = [row for row in zip(*columns, strict=True) if row[0].shape == shape]
    gap = max(1, factor * shape[1] // 16)
    cells = []
    for row in rows:
        large = [p.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for p in row]
        framed = [nn.functional.pad(p, (gap,) * 4, value=1.0) for p in large]
        cells.append(torch.cat(framed, dim=2))
    return as_image(torch.cat(cells, dim=1))
