"""Loads what an evaluation needs once for all models: base, data, features, the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase, load_frozen
from training.evaluation.clip import ClipScore
from training.evaluation.comparison import resamples
from training.evaluation.features import Extractor, load_extractor
from training.evaluation.heldout import (
    HeldOutImages,
    open_split,
    read_held_out,
    reference_features,
)
from training.evaluation.metrics import Reference
from training.evaluation.settings import EvaluationOptions
from training.objective.noising import Process, process_of
from training.objective.sampling import make_sampler
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
