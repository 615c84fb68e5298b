"""One evaluation from options to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmp_common import PatchError
from training.base.frozen import find_base
from training.base.stored_size import stored_size
from training.evaluation.closeness import Target
from training.evaluation.controls import Controls, check_controls
from training.evaluation.differences import Judged, differences
from training.evaluation.evaluation_checks import check_evaluation
from training.evaluation.measure import measure
from training.evaluation.models import Compared, load_compared
from training.evaluation.prepare import Evaluation, prepare_evaluation
from training.evaluation.report import Report, write_json, write_report
from training.evaluation.settings import EvaluationOptions
from training.evaluation.spec import BASE, CHEAP, FULL, Spec
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
    check_evaluation(options, config)
    models = load_models(options)
    controls = check_controls(models, repairs=config.has_student)
    if controls.text:
        print(controls.text, flush=True)
        if options.require_controls:
            raise PatchError(
                f"expected every control with --require_controls, found: {controls.text} Train "
                "them with --method prompt, lora and full."
            )
    folder = _writable(Path(options.out))
    rows = {**_own_rows(config), **models}
    specs = [files[0].spec for files in rows.values()]
    evaluation = prepare_evaluation(options, config, specs)
    _measure_all(evaluation, controls, rows, folder)
    print(f"evaluation.md, evaluation.json and pictures are in {folder.as_posix()}")
    return folder


def _own_rows(config: TrainConfig) -> dict[str, list[Compared]]:
    """The rows that nobody has to ask for: the full model first, then what models are put on."""
    labels = {FULL: "exact", CHEAP: "base"} if config.has_student else {BASE: "base"}
    return {label: [load_compared(Spec(label, kind, ""))] for label, kind in labels.items()}


def _measure_all(
    evaluation: Evaluation, controls: Controls, rows: Mapping[str, list[Compared]], folder: Path
) -> None:
    """Measures every row and writes the report, its figures after each row."""
    repairs = evaluation.config.has_student
    reference = CHEAP if repairs else BASE
    specs = [files[0].spec for files in rows.values()]
    target = (
        Target() if repairs or any(not s.trained or s.sampled_alone for s in specs[1:]) else None
    )
    judged: dict[str, Judged] = {}
    losses: dict[object, Tensor] = {}
    stored: dict[str, int] = {}
    for label, files in rows.items():
        spec = files[0].spec
        judged[label] = Judged(spec, evaluation.how(spec))
        for model in files:
            key = _weights_of(model.spec, repairs)
            result = measure(evaluation, model, target, losses.get(key))
            losses[key] = result.losses
            judged[label].results.append(result)
            if target is not None:
                target.complete = True
        stored[label] = _stored(evaluation, files[0])
        if reference in judged:  # after each, so that a later failure does not lose them
            report = Report(
                base=evaluation.config.base,
                reference=reference,
                settings=_settings(evaluation, controls),
                controls=controls,
                judged=judged,
                models=rows,
                stored=stored,
                base_model=evaluation.exact.model,
                differences=differences(judged, reference),
            )
            write_json(report, folder)
    write_report(report, folder)


def _weights_of(spec: Spec, repairs: bool) -> tuple[object, ...]:
    """What the loss of a row depends on: rows that differ in their samples alone have one loss."""
    kind = "base" if spec.kind == "exact" and not repairs else spec.kind
    return kind, spec.path, spec.settings.strength, spec.settings.quantization


def _stored(evaluation: Evaluation, model: Compared) -> int:
    """The bytes of a row's model: what it is put on, and what is added; full and joint are whole
    models by themselves."""
    spec, config = model.spec, evaluation.config
    if spec.kind in ("full", "joint"):
        return model.bytes_added
    asked = {"student_weights": None, "student_quantization": spec.settings.quantization}
    if spec.kind == "exact" or spec.settings.quantization is not None:
        config = config.model_copy(update=asked)
    return stored_size(evaluation.below(spec).model, config) + model.bytes_added


def load_models(options: EvaluationOptions) -> dict[str, list[Compared]]:
    """The models by label, in the order of the command line.

    Raises:
        PatchError: a label with several kinds or settings, or a file that is not of its kind.
    """
    models: dict[str, list[Compared]] = {}
    for spec in (Spec.parse(text) for text in options.model):
        others = models.setdefault(spec.label, [])
        if others and others[0].spec.kind != spec.kind:
            raise PatchError(
                f"expected one kind for label {spec.label}, found {others[0].spec.kind} and "
                f"{spec.kind}: a label stands for several seeds of one method; rename one."
            )
        if others and others[0].spec.settings != spec.settings:
            raise PatchError(
                f"expected the same settings behind @ for every seed of {spec.label}, found "
                "others: give each setting a label of its own."
            )
        if any(other.spec.path == spec.path for other in others):
            raise PatchError(
                f"expected another file for each seed of {spec.label}, found {spec.path or 'none'} "
                "twice: an interval over seeds would mean nothing."
            )
        others.append(load_compared(spec))
    return models


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
    options, reference, config = evaluation.options, evaluation.reference, evaluation.config
    kept = options.model_dump(mode="json", exclude={"model", "out", "grid", "require_controls"})
    return {
        **kept,
        "guidance_scale": evaluation.scale,
        "student_quantization": config.student_quantization,
        "student_weights": config.student_weights,
        "images": len(evaluation.held_out),
        "reference_images": 0 if reference is None else len(reference.features),
        "features": None if evaluation.extractor is None else evaluation.extractor.name,
        "not_computed": evaluation.impossible,
        "control_mismatches": controls.mismatches,
        "data": {name: getattr(config, name) for name in SOURCES},
        "mixed_precision": config.mixed_precision,
        "frames": config.frames,
    }
