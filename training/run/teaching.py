"""What --objective distill needs before training: both calls, and weights of timesteps."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.cheap import cheap_base
from training.base.frozen import FrozenBase
from training.base.loading import Said
from training.data.batch import Data
from training.objective.relative import RelativeWeights, relative_config, warn_of_rounding
from training.objective.student import Student
from training.options.config import TrainConfig
from training.run.parts import Parts
from training.run.validation import Validation


def cheap_and_exact(
    exact: FrozenBase, config: TrainConfig, said: Said
) -> tuple[FrozenBase, FrozenBase | None]:
    """The base that is trained on, and the exact one where --objective distill needs it.

    Both are the same where the cheap call lacks guidance alone, unless the method trains the
    weights, which are then another model's.
    """
    if config.objective != "distill":
        return exact, None
    if config.has_student:
        return cheap_base(exact, config, said), exact
    if config.trains_base:
        return replace(exact, model=copy.deepcopy(exact.model)), exact
    return exact, exact


def timestep_weights(parts: Parts, data: Data) -> RelativeWeights | None:
    """The weights of timesteps that are measured before training; None where there are none."""
    config = parts.config
    if config.dry_run:
        return None
    if config.objective == "distill" and config.teacher_weighting == "gap":
        return RelativeWeights(_filled(_measured(parts, data, distilled=True)))
    relative = config.objective == "distill" and config.teacher_weighting == "relative"
    if not (relative or config.relative_loss):
        return None
    losses = _measured(parts, data, distilled=False)
    if parts.accelerator.is_main_process:
        warn_of_rounding(losses, config.mixed_precision)
    return RelativeWeights(losses)


def require_gap(gaps: Tensor) -> None:
    """Refuses a cheap call that is the exact one.

    Args:
        gaps: squared distances of both (images, bins).

    Raises:
        PatchError: there is no gap.
    """
    if not bool((gaps > 0).any()):
        raise PatchError(
            "expected a cheap call that differs from the exact one for --objective distill, found "
            "equal predictions: give --student_quantization, --student_weights or "
            "--teacher_guidance_scale."
        )


def _measured(parts: Parts, data: Data, *, distilled: bool) -> Tensor:
    """Mean squared errors on training images in ranges of timesteps (bins,): of the cheap call to
    the exact one, or of the exact one to the noise."""
    config = relative_config(parts.config)
    if distilled:
        return Validation(parts, data, parts.target(), config).images(
            parts.untrained()
        ).mean(0)  # fmt: skip
    exact = parts.exact or parts.frozen
    student = Student(exact, None, parts.process, parts.config).eval()
    return Validation(parts, data, config=config).images(student).mean(0)


def _filled(gaps: Tensor) -> Tensor:
    """Gaps (bins,) with the mean in the place of those that are 0, as outside of an interval."""
    positive = gaps > 0
    if not bool(positive.any()):
        return torch.ones_like(gaps)
    return torch.where(positive, gaps, gaps[positive].mean())
