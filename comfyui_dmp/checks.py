"""Checks that a patch fits a ComfyUI model, with the error messages for those that do not."""

from __future__ import annotations

from typing import Any

import torch

from comfyui_dmp.model import denoiser_of, is_compiled, timesteps_of
from comfyui_dmp.slots import SUPPORTED
from dmp_common import PatchError, known_bases
from dmp_common.attach.record import PatchRecord
from dmp_common.bases.detect import naming_of, prediction_of
from dmp_common.bases.timesteps import frequency_shift


def require_supported(model: Any, record: PatchRecord) -> None:
    """Checks that a model is of the base that the patch was trained for.

    Args:
        model: ComfyUI's `BaseModel`.
        record: the patch.

    Raises:
        PatchError: the model is of another base, or of none that we support.
    """
    base, denoiser = record.loaded.patch.base, denoiser_of(model)
    if naming_of(denoiser, base) == "ldm":
        return
    others = [b.name for b in known_bases() if naming_of(denoiser, b) == "ldm"]
    kind = f"{type(model).__name__} ({type(denoiser).__name__})"
    found = f"{kind}, which is a model of base {others[0]}" if others else kind
    if type(model).__name__ == "SDXLRefiner":
        found += "; the refiner has blocks of other sizes, and patches are for the SDXL base"
    raise PatchError(
        f"{record.loaded.name}: expected a model of base {base.name}, found {found}: load such a "
        f"model, or a patch for this one. Supported are {SUPPORTED}."
    )


def require_usable(model: Any, record: PatchRecord) -> None:
    """Checks that a host can use the patch, and that it was trained on this time embedding.

    Raises:
        PatchError: the patch prepends its prompts, or was trained with another frequency shift.
    """
    patch, name = record.loaded.patch, record.loaded.name
    if patch.variant.mix == "prepend":
        raise PatchError(
            f"{name}: expected a patch that adds its prompts, found one that prepends them, which "
            "only the trainer can do: train a patch with mix = add."
        )
    found = frequency_shift(denoiser_of(model), patch.base, "ldm")
    if found != patch.variant.frequency_shift:
        raise PatchError(
            f"{name}: expected a time embedding of frequency shift "
            f"{patch.variant.frequency_shift:g}, found {found:g} in this model: use a patch that "
            "was trained on the original weights, not on a model made in diffusers."
        )


def require_same_prediction(model_sampling: Any, record: PatchRecord) -> None:
    """Checks that the model predicts what the patch was trained for, on the same timesteps.

    Args:
        model_sampling: ComfyUI's object of this name, which other nodes may have replaced.
        record: the patch.

    Raises:
        PatchError: the prediction type differs, or the timesteps are on another scale.
    """
    name, patch = record.loaded.name, record.loaded.patch
    found = prediction_of(model_sampling)
    if found != patch.variant.prediction:
        raise PatchError(
            f"{name}: expected a model with prediction type {patch.variant.prediction}, found "
            f"{found}: load the model that the patch was trained for, or, if this is that model, "
            "set its prediction type with a ModelSampling node."
        )
    noisiest = torch.tensor([model_sampling.percent_to_sigma(0.0)])
    first = float(timesteps_of(model_sampling, patch.base, noisiest))
    if not 500.0 < first <= 1001.0:
        raise PatchError(
            f"{name}: expected a model with timesteps from 1000 (noise) to 0, found one that "
            f"starts at {first:g}: use the model sampling that the patch was trained with."
        )


def require_not_compiled(model: Any, options: dict[str, Any]) -> None:
    """Checks that a model which needs hooks is not compiled: a compiled graph ignores hooks.

    Args:
        model: ComfyUI's `BaseModel`, of a family without a slot for patches.
        options: the `transformer_options` of the call.

    Raises:
        PatchError: the model is compiled.
    """
    if is_compiled(model, options):
        raise PatchError(
            f"a patch on a {type(denoiser_of(model)).__name__} needs hooks, which compiled models "
            "ignore: remove the compile node, or the patch."
        )
