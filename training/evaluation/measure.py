"""Measures one model: its losses on held-out images, and the metrics of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase, load_frozen
from training.base.precision import DTYPES
from training.evaluation.clip import ClipScore
from training.evaluation.comparison import bootstrap, resamples
from training.evaluation.differences import ModelResult
from training.evaluation.features import Extractor, Features, load_extractor
from training.evaluation.heldout import (
    NAME,
    HeldOutImages,
    open_split,
    read_held_out,
    reference_features,
)
from training.evaluation.metrics import Reference
from training.evaluation.models import BASE, Compared
from training.evaluation.settings import EvaluationOptions
from training.objective.losses import losses_by_bin
from training.objective.noising import Process, process_of
from training.objective.sampling import condition, draw_images, is_guided, make_sampler, noises
from training.objective.student import Student
from training.options.config import TrainConfig


@dataclass
class Evaluation:
    """Everything that does not change from model to model.

    Args:
        reference: None where no samples are drawn.
        rows: samples drawn again, for intervals.
    """

    options: EvaluationOptions
    config: TrainConfig
    frozen: FrozenBase
    process: Process
    encoders: FrozenEncoders
    held_out: HeldOutImages
    device: torch.device
    extractor: Extractor | None
    clip: ClipScore | None
    reference: Reference | None
    rows: Tensor

    @property
    def scale(self) -> float:
        """The scale of classifier-free guidance: the one asked for, or the base's own."""
        chosen = self.options.guidance_scale
        return self.frozen.family.guidance if chosen is None else chosen

    @property
    def impossible(self) -> dict[str, str]:
        """Metrics that were asked for and cannot be computed, and why."""
        options = self.options
        if not options.samples:
            return dict.fromkeys(options.wanted, "no samples were asked for")
        found = {} if self.reference is None else dict(self.reference.impossible)
        if "clip_score" in options.wanted and (self.clip is None or self.held_out.captions is None):
            captioned = self.held_out.captions is not None
            name = self.frozen.base.name
            found["clip_score"] = (
                "no --clip was given" if captioned else f"base {name} takes no captions"
            )
        return found


def prepare_evaluation(options: EvaluationOptions, config: TrainConfig) -> Evaluation:
    """Loads base, data and feature extractor, and measures the reference images."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    extractor = clip = None
    wanted = options.wanted if options.samples else []
    if wanted and wanted != ["clip_score"]:
        extractor = load_extractor(
            config.base,
            inception_weights=options.inception_weights,
            inception_sha256=options.inception_sha256,
            chosen=options.feature_extractor,
            device=device,
        )
        if extractor is None:
            raise PatchError(
                f"expected --inception_weights or --feature_extractor for metrics of base "
                f"{config.base}, found neither: give one, or --metrics none."
            )
    if "clip_score" in wanted and options.clip is not None:
        clip = ClipScore(options.clip, device)
    frozen = load_frozen(config).to(device)
    process = process_of(frozen.scheduler, config)
    if options.samples:
        make_sampler(frozen.scheduler, options.sample_steps, 64, options.sampler)
    encoders = FrozenEncoders(frozen, config)
    split, size = options.split or "test", options.batch_size or 1
    data = open_split(config, frozen, encoders, split)
    held_out = read_held_out(
        data, encoders, config, images=options.images, size=size, seed=options.seed, device=device
    )
    reference = None
    if extractor is not None:
        of = data if options.reference == "held_out" else open_split(
            config, frozen, encoders, "train"
        )  # fmt: skip
        features = reference_features(
            of, extractor, images=options.reference_images, size=size,
            workers=config.max_data_loader_n_workers,
        )  # fmt: skip
        reference = Reference(
            features, wanted, options.samples, subsets=options.kid_subsets,
            subset_size=options.kid_subset_size,
        )  # fmt: skip
    rows = resamples(max(1, options.samples), options.bootstrap_draws, options.seed)
    return Evaluation(
        options, config, frozen, process, encoders, held_out, device, extractor, clip, reference,
        rows,
    )  # fmt: skip


def measure(evaluation: Evaluation, model: Compared | None) -> ModelResult:
    """Loss, samples and metrics of one model, or of the base."""
    options = evaluation.options
    name = BASE if model is None else f"{model.spec.label} ({model.spec.path})"
    print(f"{name}: held-out loss", flush=True)
    on: AbstractContextManager[FrozenBase] = (
        nullcontext(evaluation.frozen) if model is None else model.on(evaluation.frozen)
    )
    with on as frozen, _precision(evaluation):
        student = Student(frozen, None, evaluation.process, evaluation.config).eval()
        losses = torch.cat(
            [
                losses_by_bin(
                    student, evaluation.process, inputs.to(evaluation.device),
                    bins=options.loss_bins, draws=options.loss_draws, name=(NAME, options.seed),
                )
                for inputs in evaluation.held_out.inputs
            ]
        )  # fmt: skip
        result = ModelResult(losses)
        if options.samples:
            _sample(evaluation, frozen, result, name)
    if not bool(losses.isfinite().all()):
        raise PatchError(
            f"expected finite losses, found others for {name}: the model is broken, or "
            "--mixed_precision is too coarse for it."
        )
    return result


def _sample(evaluation: Evaluation, frozen: FrozenBase, result: ModelResult, name: str) -> None:
    """Draws all samples; of each batch features are kept, and of the first pictures too."""
    options, parts, scores = evaluation.options, [], []
    for numbers, pictures, captions in generate(evaluation, frozen):
        if evaluation.extractor is not None:
            parts.append(evaluation.extractor(pictures))
        if evaluation.clip is not None and captions is not None:
            scores.append(evaluation.clip(pictures, captions))
        result.pictures += list(pictures[: max(0, options.grid - len(result.pictures))])
        result.samples = numbers[-1] + 1
        end = "\n" if result.samples == options.samples else ""
        print(f"\r{name}: sample {result.samples} of {options.samples}", end=end, flush=True)
    if evaluation.reference is not None:
        features = Features.joined(parts)
        result.measured = evaluation.reference.measure(features, options.seed)
        result.drawn = bootstrap(features, evaluation.reference, evaluation.rows)
    if scores:
        result.measured.single["clip_score"] = torch.cat(scores)
        result.measured.values["clip_score"] = float(torch.cat(scores).mean())


def generate(
    evaluation: Evaluation, frozen: FrozenBase
) -> Iterator[tuple[list[int], Tensor, list[str] | None]]:
    """Numbers of samples, pictures (B, C, H, W) in [-1, 1] on the CPU, and their captions."""
    options, scale = evaluation.options, evaluation.scale
    guided = is_guided(frozen, scale)
    blank = condition(frozen, evaluation.encoders, None, (1, 1), scale) if guided else None
    for numbers, inputs, captions in evaluation.held_out.conditions(options.samples):
        conditional = {**inputs.given, "guidance": torch.full((len(numbers),), scale)}
        unconditional = None if blank is None else _unconditional(blank, conditional, len(numbers))
        names = [(options.seed, number) for number in numbers]
        noise, sources = noises(names, tuple(inputs.clean.shape[1:]))
        pictures = draw_images(
            frozen, noise.to(evaluation.device), conditional, unconditional,
            steps=options.sample_steps, scale=scale, sampler=options.sampler, generators=sources,
            guided=options.guided_channels,
        )  # fmt: skip
        yield numbers, pictures, captions


def _unconditional(
    blank: Mapping[str, Tensor], conditional: Mapping[str, Tensor], count: int
) -> dict[str, Any]:
    """No condition for each of a batch, at the sizes of its pictures."""
    same = ("sizes", "guidance")
    repeated = {n: v.expand(count, *v.shape[1:]) for n, v in blank.items() if n not in same}
    return {**repeated, **{name: conditional[name] for name in same}}


def _precision(evaluation: Evaluation) -> AbstractContextManager[object]:
    chosen = evaluation.config.mixed_precision
    if chosen == "no":
        return nullcontext()
    return torch.autocast(evaluation.device.type, dtype=DTYPES[chosen])
