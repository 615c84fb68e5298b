"""Options of the evaluation, and its command line: the trainer's own options for base and data.

Nothing here imports torch: `--help` must not wait for it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, field_validator

from training.options.command_line import read_options
from training.options.config import TrainConfig
from training.options.declaring import Options, option
from training.options.helping import add_options, sections
from training.options.presets import has_student
from training.options.problems import ConfigError, numbered
from training.options.sentences import sentence_of
from training.options.taking import explain
from training.options.words import read_words

_SECTIONS = ("model", "data", "image size", "captions", "loading")
_OTHERS = ("mixed_precision", "cpu", "v_parameterization", "zero_terminal_snr", "config_file")
# They belong to training, or would take away what the evaluation needs.
_LEFT_OUT = {
    *("flip_aug", "random_crop", "color_aug", "vae_batch_size", "cache_dir"),
    *("cache_latents", "cache_latents_to_disk"),
    *("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
    *("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"),
}
METRIC_NAMES = ("fid", "sfid", "kid", "precision", "recall", "class_accuracy", "clip_score")


class EvaluationOptions(Options):
    """The options of the evaluation: what is measured, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: list[str] = option(
        "models",
        [],
        "A trained model as LABEL=KIND:PATH, where KIND is dmp, prompt, lora, full or joint. Give "
        "the option once for each model; the same LABEL again is another seed of it. Behind an @ "
        "stand settings of this row alone: LABEL=KIND:PATH@steps=10,guidance=2 (also sampler, "
        "epsilon, strength). LABEL=base:@steps=10,guidance=3 is a row of the base without a file, "
        "and LABEL=exact:@... one of the full model beside a cheap one.",
    )
    require_controls: bool = option(
        "models", False, "Stop where a control is missing or does not match; otherwise say so."
    )
    split: Literal["validation", "test"] | None = option(
        "held-out images",
        None,
        "Which images are held out: validation takes those that --validation_split keeps; test "
        "takes all images of the data (of the digits, their test split). (default: validation "
        "with --validation_split, else test)",
    )
    images: int | None = option(
        "held-out images",
        1000,
        "Measure the loss on this many images; samples get their conditions.",
        ge=2,
    )
    loss_bins: int = option(
        "held-out images",
        10,
        "Measure the loss in this many equal ranges of timesteps.",
        ge=1,
        le=100,
    )
    loss_draws: int = option(
        "held-out images",
        4,
        "Draw this many noises for each image and range of timesteps.",
        ge=1,
    )
    batch_size: int | None = option(
        "held-out images",
        None,
        "Put this many images through the model at once. (default: --train_batch_size)",
        ge=1,
    )
    samples: int = option(
        "samples", 1000, "Generate this many images with each model; 0 disables samples.", ge=0
    )
    sample_steps: int = option("samples", 50, "Take this many steps for each sample.", ge=1)
    guidance_scale: float | None = option(
        "samples",
        None,
        "The scale of classifier-free guidance; 1 disables guidance. (default: the base's own)",
        ge=0,
    )
    guided_channels: int | None = option(
        "samples",
        None,
        "Guide only this many first channels of the latent, as the official code of DiT and DMP "
        "does with three of four. (default: all channels)",
        ge=1,
    )
    sampler: str = option(
        "samples",
        "default",
        "The sampler: ddim (the default), ddpm, dpm++, euler or unipc. Flow models take euler.",
    )
    epsilon_scale: str = option(
        "samples",
        "1",
        "Divide the predicted noise of each sample by this number (epsilon scaling). tune chooses "
        "it for each model on validation images.",
    )
    epsilon_samples: int = option(
        "samples", 500, "Draw this many images for each number that tune tries.", ge=2
    )
    seed: int = option("samples", 0, "The seed of all noise; every model gets the same noise.")
    grid: int = option("samples", 8, "Show this many rows in samples.png.", ge=1, le=100)
    metrics: str = option(
        "metrics",
        ",".join(METRIC_NAMES),
        "Compute these metrics of the samples, separated by commas; none disables all.",
    )
    reference: Literal["held_out", "train"] = option(
        "metrics", "held_out", "Compare the samples with held-out or with training images."
    )
    reference_images: int | None = option(
        "metrics", None, "Compare with at most this many images. (default: all)", ge=2
    )
    inception_weights: str | None = option(
        "metrics",
        None,
        "The file weights-inception-2015-12-05-6726825d.pth of torch-fidelity, for FID, sFID and "
        "KID. It is never downloaded.",
    )
    inception_sha256: str = option(
        "metrics", "6726825d", "The first digits of the SHA-256 that this file must have."
    )
    feature_extractor: str | None = option(
        "metrics",
        None,
        "Another feature extractor: a TorchScript file, or package.module:function that returns a "
        "module from images (B, C, H, W) in [-1, 1] to features (B, F). The digits have their own.",
    )
    classifier: str | None = option(
        "metrics",
        None,
        "The classifier of the class accuracy: a TorchScript file, or package.module:function that "
        "returns a module from images (B, C, H, W) in [-1, 1] to logits (B, classes). The digits "
        "have their own.",
    )
    clip: str | None = option(
        "metrics", None, "The CLIP model of the CLIP score: a folder or hub id."
    )
    kid_subsets: int = option("metrics", 100, "Average KID over this many subsets.", ge=1)
    kid_subset_size: int = option("metrics", 1000, "Put this many images into each subset.", ge=2)
    bootstrap_draws: int = option(
        "metrics",
        200,
        "Draw the samples again this many times for the intervals of FID, sFID and KID.",
        ge=20,
    )
    out: str = option("output", "output/{base}-evaluation", "Write the report to this folder.")

    @field_validator("epsilon_scale")
    @classmethod
    def _is_a_scale(cls, value: str) -> str:
        as_epsilon(value)
        return value

    @property
    def wanted(self) -> list[str]:
        """The metrics asked for.

        Raises:
            ConfigError: an unknown one.
        """
        names = [name.strip() for name in self.metrics.split(",") if name.strip()]
        if self.metrics == "none":
            return []
        unknown = [name for name in names if name not in METRIC_NAMES]
        if unknown:
            raise ConfigError(
                f"--metrics: expected none or some of {', '.join(METRIC_NAMES)}, found {unknown[0]}"
            )
        return [name for name in METRIC_NAMES if name in names]


def as_epsilon(text: str) -> float | None:
    """A value of --epsilon_scale; None for one that is tuned.

    Raises:
        ValueError: it is neither a positive number nor tune.
    """
    if text == "tune":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError("expected a positive number such as 1.01, or tune")
    return value


def parse_evaluation(
    arguments: Sequence[str] | None = None,
) -> tuple[EvaluationOptions, TrainConfig]:
    """The options of the evaluation, and those it shares with the trainer; exits with a report
    where they are wrong."""
    shared = {name: TrainConfig.model_fields[name] for name in _shared()}
    known = {**EvaluationOptions.model_fields, **shared}
    words = read_words(sys.argv[1:] if arguments is None else arguments, known)
    if words.help is not None:
        _parser().print_help()
        raise SystemExit(0)
    problems = [*words.problems, *(explain(n, known) for n in words.values if n not in known)]
    given = {n: v for n, v in words.values.items() if n in shared}
    if has_student(given):
        given["objective"] = "distill"  # the only one with a cheap model
    found = read_options(given)
    problems += found.problems
    own = {n: v for n, v in words.values.items() if n in EvaluationOptions.model_fields}
    options = _options(own, found.config, problems)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if problems:
        print(f"error: {numbered(problems)}", file=sys.stderr)
        raise SystemExit(2)
    return options, found.config


def _options(given: dict[str, Any], config: TrainConfig, problems: list[str]) -> EvaluationOptions:
    """The evaluation's own options; what is wrong with them joins the problems."""
    try:
        options = EvaluationOptions(**given)
    except ValidationError as error:
        wrong = {str(entry["loc"][0]) for entry in error.errors()}
        problems += [sentence_of(name, error) for name in sorted(wrong)]
        options = EvaluationOptions(**{n: v for n, v in given.items() if n not in wrong})
    if not (options.model or config.has_student):
        problems.append("expected --model LABEL=KIND:PATH, found none: name what to evaluate.")
    try:
        _ = options.wanted  # an unknown name is found here
    except ConfigError as error:
        problems += error.problems
    changes: dict[str, Any] = {"out": options.out.replace("{base}", config.base.replace("/", "-"))}
    if options.split is None:
        changes["split"] = "validation" if config.validation_split else "test"
    if options.batch_size is None:
        changes["batch_size"] = config.train_batch_size
    return options.model_copy(update=changes)


def _shared() -> list[str]:
    """The trainer's options that mean something here."""
    names = [n for section in _SECTIONS for n in sections(TrainConfig)[section]]
    return [n for n in [*names, *_OTHERS] if n not in _LEFT_OUT]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        usage="%(prog)s --base NAME --model LABEL=KIND:PATH [options]",
        description="Compares trained models with their base and with each other. "
        "docs/EVALUATION.md is the guide.",
    )
    add_options(parser, EvaluationOptions, list(EvaluationOptions.model_fields))
    add_options(parser, TrainConfig, _shared())
    return parser
