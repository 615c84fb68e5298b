"""One evaluation from options to files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dmp_common import PatchError, get_base
from training.base.frozen import find_base
from training.evaluation.controls import Controls, check_controls
from training.evaluation.differences import Judged, differences
from training.evaluation.measure import measure
from training.evaluation.models import Compared, load_compared
from training.evaluation.prepare import Evaluation, prepare_evaluation
from training.evaluation.report import Report, write_json, write_report
from training.evaluation.settings import EvaluationOptions
from training.evaluation.spec import BASE, Spec
from training.options.command_line import with_base
from training.options.config import TrainConfig
from training.options.data_options import SOURCES


def evaluate(options: EvaluationOptions, config: TrainConfig) -> Path:
    """Measures base and models, writes the report, and returns its folder.

    Raises:
        PatchError: an unusable option, file, base or data; nothing is written then.
    """
    if config.base == "auto":
        config = with_base(config, find_base(config).name)
    get_base(config.base)
    _require_source(config)
    models = load_models(options)
    controls = check_controls(models)
    if controls.text:
        print(controls.text, flush=True)
        if options.require_controls:
            raise PatchError(
                f"expected every control with --require_controls, found: {controls.text} Train "
                "them with --method prompt, lora and full."
            )
    _require_packages(options)
    folder = _writable(Path(options.out))
    evaluation = prepare_evaluation(options, config)
    judged = {BASE: Judged(BASE, BASE, [measure(evaluation, None)])}
    for label, files in models.items():
        results = [measure(evaluation, model) for model in files]
        judged[label] = Judged(label, files[0].spec.kind, results)
        report = Report(
            base=config.base,
            settings=_settings(evaluation, controls),
            controls=controls,
            judged=judged,
            models=models,
            base_model=evaluation.frozen.model,
            differences=differences(judged),
        )
        write_json(report, folder)  # after each, so that a later failure does not lose them
    write_report(report, folder)
    print(f"evaluation.md, evaluation.json and pictures are in {folder.as_posix()}")
    return folder


def _require_packages(options: EvaluationOptions) -> None:
    """Stops at the beginning where a package is missing that is needed at the end."""
    needed = ["matplotlib"]
    if options.samples and "kid" in options.wanted:
        needed.append("torchmetrics")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise PatchError(
            f"expected the packages of the evaluation, found no {' and no '.join(missing)}: "
            'pip install -e ".[evaluation]".'
        )


def load_models(options: EvaluationOptions) -> dict[str, list[Compared]]:
    """The models by label, in the order of the command line.

    Raises:
        PatchError: a label with several kinds, or a file that is not of its kind.
    """
    models: dict[str, list[Compared]] = {}
    for spec in (Spec.parse(text) for text in options.model):
        others = models.setdefault(spec.label, [])
        if others and others[0].spec.kind != spec.kind:
            raise PatchError(
                f"expected one kind for label {spec.label}, found {others[0].spec.kind} and "
                f"{spec.kind}: a label stands for several seeds of one method; rename one."
            )
        if any(other.spec.path == spec.path for other in others):
            raise PatchError(
                f"expected another file for each seed of {spec.label}, found {spec.path} twice: an "
                "interval over seeds would mean nothing."
            )
        others.append(load_compared(spec))
    return models


def _require_source(config: TrainConfig) -> None:
    if not any(getattr(config, name) for name in SOURCES):
        raise PatchError(
            f"expected held-out images for base {config.base}, found none: give "
            f"{', '.join('--' + name for name in SOURCES)}."
        )


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise PatchError(
            f"expected a folder to write to, found {folder} ({error.strerror}): change --out."
        ) from error
    return folder


def _settings(evaluation: Evaluation, controls: Controls) -> dict[str, Any]:
    """The settings that the figures depend on, and the metrics that could not be computed."""
    options, reference = evaluation.options, evaluation.reference
    kept = options.model_dump(mode="json", exclude={"model", "out", "grid", "require_controls"})
    return {
        **kept,
        "guidance_scale": evaluation.scale,
        "images": len(evaluation.held_out),
        "reference_images": 0 if reference is None else len(reference.features),
        "features": None if evaluation.extractor is None else evaluation.extractor.name,
        "not_computed": evaluation.impossible,
        "control_mismatches": controls.mismatches,
        "data": {name: getattr(evaluation.config, name) for name in SOURCES},
        "mixed_precision": evaluation.config.mixed_precision,
    }
