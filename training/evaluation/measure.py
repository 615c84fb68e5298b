"""Measures one model: its losses on held-out images, and the metrics of its samples."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.base.precision import DTYPES
from training.evaluation.closeness import FEATURES, PIXELS, Target
from training.evaluation.comparison import bootstrap
from training.evaluation.differences import ModelResult
from training.evaluation.features import Features
from training.evaluation.generating import Generated, counted_calls, generate
from training.evaluation.heldout import NAME
from training.evaluation.models import Compared
from training.evaluation.prepare import Evaluation
from training.evaluation.spec import How
from training.evaluation.tuned_epsilon import tuned_epsilon
from training.objective.losses import losses_by_bin
from training.objective.pictures import strip
from training.objective.scaling import epsilon_scaled
from training.objective.student import Student


def measure(
    evaluation: Evaluation, model: Compared, target: Target | None, known: Tensor | None = None
) -> ModelResult:
    """Loss, samples and metrics of one model.

    Args:
        target: the full model's pictures, or where they are to be kept; None to compare with none.
        known: its losses, where another row with the same model has them already.
    """
    spec = model.spec
    name = f"{spec.label} ({spec.path})" if spec.trained else spec.label
    with model.on(evaluation.below(spec)) as frozen, _precision(evaluation):
        if known is None:
            print(f"{name}: held-out loss", flush=True)
            known = _losses(evaluation, frozen)
        result = ModelResult(known)
        if evaluation.options.samples:
            _sample(evaluation, frozen, result, name, evaluation.how(spec), target)
    if not bool(known.isfinite().all()):
        raise PatchError(
            f"expected finite losses, found others for {name}: the model is broken, or "
            "--mixed_precision is too coarse for it."
        )
    return result


def _losses(evaluation: Evaluation, frozen: FrozenBase) -> Tensor:
    """(images, bins) float64."""
    options = evaluation.options
    student = Student(frozen, None, evaluation.process, evaluation.config).eval()
    return torch.cat(
        [
            losses_by_bin(
                student, evaluation.process, inputs.to(evaluation.device),
                bins=options.loss_bins, draws=options.loss_draws, name=(NAME, options.seed),
            )
            for inputs in evaluation.held_out.inputs
        ]
    )  # fmt: skip


def _sample(
    evaluation: Evaluation,
    frozen: FrozenBase,
    result: ModelResult,
    name: str,
    how: How,
    target: Target | None,
) -> None:
    """Draws all samples; of each batch features are kept, and of the first pictures too."""
    options = evaluation.options
    parts: list[Features] = []
    single: dict[str, list[Tensor]] = {}
    if how.epsilon is None:
        print(f"{name}: epsilon scale", flush=True)
        choice = tuned_epsilon(evaluation, frozen, how)
        result.epsilon, result.choice = choice.best, choice
    else:
        result.epsilon = how.epsilon
    with epsilon_scaled(frozen, result.epsilon), counted_calls(frozen.model) as calls:
        for batch in generate(evaluation, frozen, how, evaluation.held_out, options.samples):
            if evaluation.extractor is not None:
                parts.append(evaluation.extractor(batch.pictures))
            for measured, values in _single(evaluation, batch, target).items():
                single.setdefault(measured, []).append(values)
            shown = batch.pictures[: max(0, options.grid - len(result.pictures))]
            result.pictures += [strip(picture) for picture in shown]
            result.samples = batch.first + len(batch.pictures)
            end = "\n" if result.samples == options.samples else ""
            print(f"\r{name}: sample {result.samples} of {options.samples}", end=end, flush=True)
    result.evaluations = calls.items / result.samples
    found = {measured: torch.cat(values) for measured, values in single.items()}
    features = Features.joined(parts) if parts else None
    if evaluation.reference is not None and features is not None:
        result.measured = evaluation.reference.measure(features, options.seed)
        result.drawn = bootstrap(features, evaluation.reference, evaluation.rows)
    if target is not None and features is not None:
        found[FEATURES] = target.feature_distances(features.pooled)
    result.measured.single |= found
    result.measured.values |= {measured: float(v.mean()) for measured, v in found.items()}


def _single(evaluation: Evaluation, batch: Generated, target: Target | None) -> dict[str, Tensor]:
    """The measures that each sample has by itself, but for those of its features: (B,) each."""
    found = {}
    if target is not None:
        found[PIXELS] = target.distances(batch.first, batch.pictures)
    if evaluation.classifier is not None and batch.labels is not None:
        with torch.no_grad():
            classes = evaluation.classifier(batch.pictures.to(evaluation.device)).argmax(1).cpu()
        found["class_accuracy"] = (classes == batch.labels).double()
    if evaluation.clip is not None and batch.captions is not None:
        found["clip_score"] = evaluation.clip(batch.pictures, batch.captions)
    return found


def _precision(evaluation: Evaluation) -> AbstractContextManager[object]:
    chosen = evaluation.config.mixed_precision
    if chosen == "no":
        return nullcontext()
    return torch.autocast(evaluation.device.type, dtype=DTYPES[chosen])
