"""Options of what the trained values are for: the paper's objective, or the exact call of a base.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import field_validator

from training.options.declaring import Options, option

ObjectiveName = Literal["data", "distill", "own", "two-sided"]
States = Literal["data", "teacher", "student"]
TeacherWeighting = Literal["plain", "gap", "relative"]


class TeacherOptions(Options):
    """What the student's predictions are compared with."""

    objective: ObjectiveName = option(
        "objective",
        "data",
        "Choose what is learned. data: predict the noise of the training data, as the paper does. "
        "distill: predict what the exact call of the base predicts (full weights, and guidance "
        "with --teacher_guidance_scale) by a cheap call (weights of --student_weights or "
        "--student_quantization, one evaluation). own (experimental): learn the noise of the "
        "base's own samples, with the opposite sign, so that the patch leads away from them. "
        "two-sided (experimental): data at strength 1 and own samples at strength -1. On the "
        "digits neither was better than epsilon scaling, which needs no training.",
        common=True,
    )
    teacher_weighting: TeacherWeighting = option(
        "objective",
        "plain",
        "Weight timesteps in --objective distill. plain: all alike, so that large gaps count "
        "most. gap: by 1 / the gap there before training. relative: by 1 / the loss of the exact "
        "model there.",
    )
    teacher_guidance_scale: str | None = option(
        "objective",
        None,
        "Let the exact call of --objective distill be guided with this scale W, so that the cheap "
        "call needs no second evaluation. 1:W draws the scale of each image between 1 and W and "
        "trains the patch at the strength (w - 1) / (W - 1): the strength of the patch is then a "
        "dial of guidance. --min_timestep and --max_timestep make it an interval of guidance.",
    )
    states: States = option(
        "objective",
        "data",
        "Choose the noisy data at which --objective distill compares both calls. data: noised "
        "training data. teacher: what the exact call passes through while it draws pictures, from "
        "captions or classes alone. student: the same of the cheap call as it is.",
    )
    state_captions: str | None = option(
        "objective",
        None,
        "Read the captions (or class ids) of --states teacher and student from this text file, one "
        "on each line; no pictures are needed then. By default they are those of the training "
        "data, or without any all classes of the base.",
    )
    trajectories: int = option(
        "objective", 1000, "Draw this many pictures for --states teacher and student.", ge=1
    )
    state_sampler: Literal["default", "ddim", "unipc", "dpm++"] = option(
        "objective",
        "default",
        "Draw them with this sampler: ddim, or Euler for flow models, by default.",
    )
    state_steps: int = option(
        "objective",
        20,
        "Draw them in this many steps at least, and at most twice as many, so that the patch sees "
        "the timesteps in between.",
        ge=1,
        le=500,
    )
    state_guidance_scale: float = option(
        "objective",
        1.0,
        "Draw them with this scale of guidance, as the patch will be used with; what is learned "
        "stays the prediction without it.",
        ge=0,
        le=100,
    )
    cache_teacher: bool = option(
        "objective",
        False,
        "Compute the exact predictions of --objective distill first and keep them in files, so "
        "that only the cheap model is in memory while training. --states teacher and student "
        "always do so.",
    )
    teacher_draws: int = option(
        "objective",
        10,
        "Compute this many exact predictions of each image for --cache_teacher, each at its own "
        "timestep and noise.",
        ge=1,
    )
    own_samples: int = option(
        "objective",
        2000,
        "Draw this many samples of the base before training, for --objective own and two-sided. "
        "They are kept in the folder own-samples of --cache_dir, or of --output_dir, and used "
        "again.",
        ge=1,
    )
    own_sampler: str = option(
        "objective",
        "unipc",
        "Draw them with this sampler, one of those of --sampler of the evaluation. Flow models "
        "take their own by default.",
    )
    own_steps: int = option("objective", 20, "Draw them in this many steps.", ge=1, le=1000)
    negative_prompt: str = option(
        "objective",
        "",
        "Use this caption for the unconditional side of --teacher_guidance_scale. By default it is "
        "the empty caption.",
    )

    choose_strength: bool = option(
        "validation",
        False,
        "After training, look for the strength that validates best and fold it into the trained "
        "values, so that strength 1 is the best one.",
    )

    @field_validator("teacher_guidance_scale", mode="before")
    @classmethod
    def _scale_as_text(cls, value: Any) -> Any:
        """TOML files and callers may give a number."""
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return f"{value:g}" if numeric else value

    @field_validator("teacher_guidance_scale")
    @classmethod
    def _is_a_scale(cls, value: str | None) -> str | None:
        if value is None:
            return None
        low, _, high = value.rpartition(":")
        try:
            ends = [float(part) for part in (low or high, high)]
        except ValueError:
            ends = [math.nan]
        if not all(math.isfinite(end) and 0 <= end <= 100 for end in ends) or ends[-1] <= 1:
            raise ValueError("expected a scale above 1 such as 4.5, or a range such as 1:4.5")
        if low and ends[0] != 1:
            raise ValueError(
                "expected a range that begins at 1, which is no guidance, because strength 0 is "
                f"the base without guidance; give 1:{high}"
            )
        return value

    @property
    def stores_predictions(self) -> bool:
        """Whether the exact predictions are on disk before the training begins."""
        return self.objective == "distill" and (self.cache_teacher or self.states != "data")

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The smallest and the greatest scale of the exact call's guidance; None without any."""
        if self.teacher_guidance_scale is None:
            return None
        low, _, high = self.teacher_guidance_scale.rpartition(":")
        return float(low or high), float(high)
