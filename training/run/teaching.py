"""What --objective distill needs before training: both calls, and weights of timesteps."""

from __future__ import annotations

import copy
import gc
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.levels import BINS, RelativeWeights, gap_weights
from training.base.cheap import cheap_base
from training.base.families.family import Given
from training.base.memory import give_back
from training.data.batch import Data
from training.objective.relative import relative_config, warn_of_rounding
from training.objective.stored_aims import StoredData
from training.objective.student import Student
from training.run.filling import Filling
from training.run.parts import Parts
from training.run.telling import Telling
from training.run.validation import Validation


@dataclass(frozen=True)
class Prepared:
    """What is ready once the exact call is not needed any more, or is kept for the training.

    Args:
        parts: with the cheap base, and the exact one where it is kept.
        data: to train on: pictures, or exact predictions on disk.
        relative: weights of timesteps, None where there are none.
    """

    parts: Parts
    data: Data
    relative: RelativeWeights | None


def prepare(parts: Parts, data: Data, validation: Validation | None, tell: Telling) -> Prepared:
    """Asks the exact call what has to be known before training, and makes the cheap base.

    Where the predictions are kept in files, the exact model is let go before the cheap one is
    loaded, so that both are never in memory together; a cheap one that is made out of the exact
    one, or that draws the states itself, is the exception.

    Args:
        parts: with the base as it was loaded.
        validation: of held-out images; None without.
    """
    config = parts.config
    if config.objective != "distill" or config.dry_run:
        parts = _with_cheap(parts, tell, release=False)
        return Prepared(parts, data, _weights(parts, data))
    stores, by_cheap = config.stores_predictions, config.states == "student"
    relative = _weights(parts, data) if config.teacher_weighting != "gap" else None
    if stores and validation is not None:
        validation.ask()
    if not stores:
        parts = _with_cheap(parts, tell, release=False)
    elif by_cheap:
        parts = _with_cheap(parts, tell, release=False)
        data = Filling(parts, data).fill(tell)
        parts = _released(parts)
    else:
        data = Filling(parts, data).fill(tell)
        parts = _with_cheap(parts, tell, release=True)
    if config.teacher_weighting == "gap":
        relative = _gap_weights(parts, data)
    return Prepared(parts, data, relative)


def _with_cheap(parts: Parts, tell: Telling, release: bool) -> Parts:
    """The parts with the cheap base as the one that is trained on.

    Both calls are of one model where the cheap one lacks guidance alone, unless the method trains
    the weights, which are then another model's.

    Args:
        release: let the exact model go.
    """
    exact, config = parts.exact, parts.config
    if exact is None or not (config.has_student or config.trains_base):
        return replace(parts, exact=None) if release else parts
    if config.student_weights is not None and release:  # nothing of the exact weights is used
        parts = _released(parts)
    if config.has_student:
        cheap = cheap_base(exact, config, tell.say)
    else:
        cheap = replace(exact, model=copy.deepcopy(exact.model))
    cheap.to(parts.device)
    parts = replace(parts, frozen=cheap)
    return _released(parts) if release else parts


def _released(parts: Parts) -> Parts:
    """The parts without the exact model, whose memory is given back unless it is the cheap one."""
    exact = parts.exact
    if exact is not None and (exact.model is not parts.frozen.model or parts.config.has_student):
        give_back(exact.model)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return replace(parts, exact=None)


def _weights(parts: Parts, data: Data) -> RelativeWeights | None:
    """The weights of timesteps by the loss of the exact base; None where there are none."""
    config = parts.config
    relative = config.objective == "distill" and config.teacher_weighting == "relative"
    if config.dry_run or not (relative or config.relative_loss):
        return None
    exact = parts.exact or parts.frozen
    student = Student(exact, None, parts.process, config).eval()
    losses = Validation(parts, data, config=relative_config(config)).images(student).mean(0)
    if parts.accelerator.is_main_process:
        warn_of_rounding(losses, config.mixed_precision)
    return RelativeWeights(losses)


def _gap_weights(parts: Parts, data: Data) -> RelativeWeights:
    """The weights of timesteps by the gap of the cheap call as it is."""
    student = parts.untrained()
    if isinstance(data, StoredData):
        gaps = data.gaps(student, parts.device, parts.accelerator.autocast, BINS)
    else:
        config, teacher = relative_config(parts.config), parts.teacher()

        def target(_: Hashable, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
            return teacher(noisy, t, given)

        gaps = Validation(parts, data, target, config).images(student).mean(0)
    return gap_weights(gaps)


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
