"""Loads what an evaluation needs once for all models: base, data, features, the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dmp_common import PatchError
from training.base.cheap import cheap_base
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase, load_frozen
from training.base.schedulers import token_side
from training.evaluation.clip import ClipScore
from training.evaluation.comparison import resamples
from training.evaluation.features import Extractor, load_classifier, load_extractor
from training.evaluation.heldout import (
    HeldOutImages,
    open_split,
    read_held_out,
    reference_features,
)
from training.evaluation.metrics import Reference
from training.evaluation.settings import EvaluationOptions, as_epsilon
from training.evaluation.spec import How, Spec
from training.objective.frechet import Gaussian
from training.objective.noising import Process, process_of
from training.objective.sampling import is_guided, make_sampler
from training.objective.scaling import epsilon_scaled
from training.options.config import TrainConfig

_VIDEOS = "it is a measure of pictures; videos are compared with those of the full model"


@dataclass(frozen=True)
class ValidationImages:
    """Images that epsilon scales are chosen on.

    Args:
        images: whose conditions samples get.
        reference: their features.
    """

    images: HeldOutImages
    reference: Gaussian


@dataclass
class Evaluation:
    """Everything that does not change from model to model.

    Args:
        frozen: what the models are put on: the base, or its cheap form.
        exact: the base itself.
        reference: None where no samples are drawn.
        rows: samples drawn again, for intervals.
        classifier: of the class accuracy; None without.
        validation: what epsilon scales are chosen on; None where none is tuned.
    """

    options: EvaluationOptions
    config: TrainConfig
    frozen: FrozenBase
    exact: FrozenBase
    process: Process
    encoders: FrozenEncoders
    held_out: HeldOutImages
    device: torch.device
    extractor: Extractor | None
    clip: ClipScore | None
    reference: Reference | None
    rows: Tensor
    classifier: nn.Module | None = None
    validation: ValidationImages | None = None

    @property
    def scale(self) -> float:
        """The scale of classifier-free guidance: the one asked for, or the base's own."""
        chosen = self.options.guidance_scale
        return self.frozen.family.guidance if chosen is None else chosen

    def how(self, spec: Spec) -> How:
        """How the samples of a row are drawn: as the options say, but for its own settings."""
        own, options = spec.settings, self.options
        return How(
            options.sample_steps if own.steps is None else own.steps,
            self.scale if own.guidance is None else own.guidance,
            own.sampler or options.sampler,
            as_epsilon(own.epsilon or options.epsilon_scale),
        )

    def below(self, spec: Spec) -> FrozenBase:
        """What a row's model is put on."""
        if spec.settings.quantization is not None:
            asked = {"student_weights": None, "student_quantization": spec.settings.quantization}
            return cheap_base(self.exact, self.config.model_copy(update=asked))
        return self.exact if spec.kind == "exact" else self.frozen

    @property
    def impossible(self) -> dict[str, str]:
        """Metrics that were asked for and cannot be computed, and why."""
        options = self.options
        if not options.samples:
            return dict.fromkeys(options.wanted, "no samples were asked for")
        if self.config.frames > 1:
            return dict.fromkeys(options.wanted, _VIDEOS)
        found = {} if self.reference is None else dict(self.reference.impossible)
        if "class_accuracy" in options.wanted and self.frozen.kind.conditioning != "label":
            found["class_accuracy"] = f"base {self.frozen.base.name} takes no classes"
        elif "class_accuracy" in options.wanted and self.classifier is None:
            found["class_accuracy"] = f"no --classifier was given for base {self.frozen.base.name}"
        if "clip_score" in options.wanted and (self.clip is None or self.held_out.captions is None):
            captioned = self.held_out.captions is not None
            name = self.frozen.base.name
            found["clip_score"] = (
                "no --clip was given" if captioned else f"base {name} takes no captions"
            )
        return found


def prepare_evaluation(
    options: EvaluationOptions, config: TrainConfig, specs: Sequence[Spec]
) -> Evaluation:
    """Loads base, data and feature extractor, and measures the reference images.

    Args:
        specs: the rows of the report, whose settings are checked here.

    Raises:
        PatchError: an option, a file or data that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    # Sets of pictures are compared with these; videos with those of the full model alone.
    wanted = options.wanted if options.samples and config.frames == 1 else []
    extractor = _extractor(options, config, wanted, device)
    clip = ClipScore(options.clip, device) if "clip_score" in wanted and options.clip else None
    classifier = None
    if "class_accuracy" in wanted:
        classifier = load_classifier(config.base, options.classifier, device)
    # Samples need a first frame or a caption of a picture: as a video it stands still.
    exact = replace(load_frozen(config), stills=True).to(device)
    frozen = cheap_base(exact, config) if config.has_student else exact
    encoders = FrozenEncoders(frozen, config)
    split, size = options.split or "test", options.batch_size or 1
    data = open_split(config, frozen, encoders, split)
    held_out = read_held_out(
        data, encoders, config, images=options.images, size=size, seed=options.seed, device=device
    )
    reference = None
    if extractor is not None and config.frames == 1:
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
    process = process_of(frozen.scheduler, config, token_side(frozen.base))
    evaluation = Evaluation(
        options, config, frozen, exact, process, encoders, held_out,
        device, extractor, clip, reference, rows, classifier,
    )  # fmt: skip
    if options.samples:
        _check_rows(evaluation, specs)
    return evaluation


def _extractor(
    options: EvaluationOptions, config: TrainConfig, wanted: Sequence[str], device: torch.device
) -> Extractor | None:
    """The feature extractor of the metrics that need one; of videos one that is named."""
    named = options.inception_weights or options.feature_extractor
    of_videos = named and options.samples and config.frames > 1
    if not (of_videos or set(wanted) - {"clip_score", "class_accuracy"}):
        return None
    found = load_extractor(
        config.base,
        inception_weights=options.inception_weights,
        inception_sha256=options.inception_sha256,
        chosen=options.feature_extractor,
        device=device,
    )
    if found is None:
        raise PatchError(
            f"expected --inception_weights or --feature_extractor for metrics of base "
            f"{config.base}, found neither: give one, or --metrics none."
        )
    return found


def _check_rows(evaluation: Evaluation, specs: Sequence[Spec]) -> None:
    """Stops before anything is measured where a row cannot be sampled; opens the validation images
    where one needs them."""
    hows = {evaluation.how(spec) for spec in specs}
    for how in hows:
        make_sampler(evaluation.frozen.scheduler, how.steps, 64, how.sampler)
        is_guided(evaluation.frozen, how.scale)
        if how.epsilon != 1:
            with epsilon_scaled(evaluation.frozen, how.epsilon or 1.01):
                pass
    if any(how.epsilon is None for how in hows):
        evaluation.validation = _validation_images(evaluation)


def _validation_images(evaluation: Evaluation) -> ValidationImages:
    options, config, extractor = evaluation.options, evaluation.config, evaluation.extractor
    if extractor is None:
        raise PatchError(
            "expected a metric of features, such as fid, where an epsilon scale is tuned: it is "
            "chosen by the Frechet distance; add fid to --metrics."
        )
    data = open_split(config, evaluation.frozen, evaluation.encoders, "validation")
    size = options.batch_size or 1
    images = read_held_out(
        data, evaluation.encoders, config, images=options.images, size=size, seed=options.seed,
        device=evaluation.device,
    )  # fmt: skip
    features = reference_features(
        data, extractor, images=options.reference_images, size=size,
        workers=config.max_data_loader_n_workers,
    )  # fmt: skip
    return ValidationImages(images, Gaussian(features.pooled, "the validation images"))
