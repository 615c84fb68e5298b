"""The text of evaluation.md, from what is in evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.evaluation.closeness import FEATURES, PIXELS
from training.evaluation.comparison import Difference
from training.evaluation.controls import Controls
from training.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from training.evaluation.models import TRAINING

_NAMES = {
    "loss": "held-out loss",
    PIXELS: "distance to the full model, pixels",
    FEATURES: "distance to the full model, features",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
    "clip_score": "CLIP score",
}


def as_markdown(
    data: Mapping[str, Any],
    controls: Controls,
    differences: Sequence[Difference],
    columns: Sequence[str],
) -> str:
    """The content of evaluation.md.

    Args:
        data: of evaluation.json.
        controls, differences: what it has of them, as objects.
        columns: of samples.png; none without samples.
    """
    settings, models = data["settings"], data["models"]
    lines = [f"# Evaluation on base {data['base']}", ""]
    if controls.text:
        lines += [f"**{controls.text}**", ""]
    beside = _to_full(models)
    shown = [name for name in METRICS if not (beside and name in (PIXELS, FEATURES))]
    lines += [_about(settings), "", *beside, *_values(models, shown), ""]
    for name, why in settings["not_computed"].items():
        lines.append(f"- {_NAMES[name]} was not computed: {why}.")
    lines += ["", "## Models", "", *_trained(models), "", *_epsilon(settings, models)]
    lines += [*_primary(data["primary"]), "## Differences", ""]
    lines += _differences(differences)
    lines += ["", "## Loss by timestep", "", "![loss](loss_by_bin.png)", ""]
    lines += _bins(models, data["reference"])
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
    frames, count = settings["frames"], settings["reference_images"]
    videos = f" videos of {frames} frames" if frames > 1 else ""
    compared = f"; compared with {count} {against} images ({features})" if count else ""
    return (
        f"{loss} Samples: {settings['samples']}{videos} from equal noise, "
        f"{settings['sample_steps']} steps ({settings['sampler']}), guidance "
        f"{settings['guidance_scale']:g}{of}, seed {settings['seed']}{compared}."
    )


def _values(models: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    given = {name for model in models.values() for name in model["metrics"]}
    names = [name for name in shown if name in given]
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


def _to_full(models: Mapping[str, Any]) -> list[str]:
    """The first measure of a repair, where anything is compared with a full model."""
    rows = {label: model["to_full"] for label, model in models.items() if model["to_full"]}
    if not rows:
        return []
    sides = list(next(iter(rows.values())))
    titles = ["model", "evaluations per picture", "MB in all"]
    for side in sides:
        titles += [f"{side} ↓", "gone ↑"]
    lines = [
        "How far each picture is from the one that the first row draws from the same noise: mean "
        "squared distance of pixels, and of features as a share of their variance. Gone: the share "
        "of the distance of the row without a file that is sampled alike. Intervals are 95 %, over "
        "pictures; the last is over seeds.",
        "",
        _row(titles),
        _row(["---"] * len(titles)),
    ]
    for label, model in models.items():
        cells = [label, f"{model['evaluations_per_picture']:g}", f"{model['bytes'] / 1e6:.3f}"]
        for side in sides:
            one = rows.get(label, {}).get(side)
            cells += ["0", ""] if one is None else [_interval(one), _gone(one["gone"])]
        lines.append(_row(cells))
    return [*lines, ""]


def _interval(one: Mapping[str, float], percent: bool = False) -> str:
    form = ".1%" if percent else ".4g"
    mean, low, high = (f"{one[name] + 0.0:{form}}" for name in ("mean", "low", "high"))  # no -0
    return f"{mean} [{low}, {high}]"


def _gone(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    seeds = one["seeds"]
    text = _interval(one, percent=True)
    return text if seeds is None else f"{text}; [{seeds['low']:.1%}, {seeds['high']:.1%}]"


def _trained(models: Mapping[str, Any]) -> list[str]:
    titles = ["model", "method", "seeds", "parameters", "bytes added", "learning rate", "EMA"]
    titles += ["steps", "sampling steps", "guidance", "evaluations per picture"]
    lines = [_row(titles), _row(["---"] * len(titles))]
    for label, model in models.items():
        sampling = model["sampling"]
        cells = [label, model["method"], str(len(model["files"]) or ""), f"{model['parameters']:,}"]
        cells += [f"{model['bytes_added']:,}" if model["files"] else ""]
        cells += [_told(model["trained"][name]) for name in TRAINING]
        if model["samples"]:
            cells += [f"{sampling['steps']} ({sampling['sampler']})"]
            cells += [f"{sampling['guidance_scale']:g}", f"{model['evaluations_per_picture']:g}"]
        else:
            cells += ["", "", ""]
        lines.append(_row(cells))
    return lines


def _epsilon(settings: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Which epsilon scales were used, and how they were chosen."""
    lines = []
    for label, model in models.items():
        scales, tried = model["sampling"]["epsilon_scale"], model["sampling"]["epsilon_tried"]
        if not tried and set(scales) == {1.0}:
            continue
        text = f"- {label}: epsilon scale {', '.join(f'{scale:g}' for scale in scales)}"
        if tried:
            text += f", chosen out of {', '.join(sorted(set().union(*tried), key=float))}"
        if not model["sampling"]["epsilon_inside"]:
            text += ", **at the edge of what was tried**"
        lines.append(f"{text}.")
    if any(model["sampling"]["epsilon_tried"] for model in models.values()):
        same = settings["split"] == "validation"
        lines.append(
            f"\nEach was chosen by the Frechet distance of {settings['epsilon_samples']} samples, "
            "from other noise, to the validation images"
            + (", which are also those of this report: give --split test." if same else ".")
        )
    return [*lines, ""] if lines else []


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _primary(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparisons that the report is about."""
    if not found:
        return []
    model, measure = found[0]["model"], _NAMES[found[0]["measure"]]
    lines = [
        "## Primary comparisons",
        "",
        f"{model} beside every other row, in {measure}, over seeds. p (Holm) is corrected for the "
        "number of rows: below 0.05 the rows differ. All that follows is exploration.",
        "",
        _row([f"{model} - against", "difference", "95 % interval", "p", "p (Holm)"]),
        _row(["---"] * 5),
    ]
    for one in found:
        difference = one["difference"]
        interval = f"{difference['low']:+.3g} to {difference['high']:+.3g}"
        cells = [one["against"], f"{difference['mean']:+.3g}", interval]
        lines.append(_row([*cells, f"{one['p']:.3g}", f"{one['p_holm']:.3g}"]))
    return [*lines, ""]


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


def _bins(models: Mapping[str, Any], reference: str) -> list[str]:
    bins = len(models[reference]["loss_by_bin"])
    lines = [_row(["timesteps", *models]), _row(["---"] * (len(models) + 1))]
    for number in range(bins):
        first, last = 1000 * number // bins, 1000 * (number + 1) // bins - 1
        losses = [f"{model['loss_by_bin'][number]:.5f}" for model in models.values()]
        lines.append(_row([f"{first}-{last}", *losses]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
