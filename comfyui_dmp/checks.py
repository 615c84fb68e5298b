"""What must hold before a patch may act on a ComfyUI model, and what to say when it does not."""

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
    """A `BaseModel` must be of the patch's base.

    Raises:
        PatchError: it is of another one, or of none we know.
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
    """The patch must be one that a host can use, made for the model's time embedding.

    Raises:
        PatchError: it prepends its prompts, or was trained with another frequency shift.
    """
    patch, name = record.loaded.patch, record.loaded.name
    if patch.variant.mix == "prepend":
        raise PatchError(
            f"{name}: expected a patch that adds its prompts, found one that prepends them, which "
            "only the trainer can do: train one with mix = add."
        )
    found = frequency_shift(denoiser_of(model), patch.base, "ldm")
    if found != patch.variant.frequency_shift:
        raise PatchError(
            f"{name}: expected a time embedding of frequency shift "
            f"{patch.variant.frequency_shift:g}, found {found:g} in this model: use a patch that "
            "was trained on the original weights, not on a model made in diffusers."
        )


def require_same_prediction(model_sampling: Any, record: PatchRecord) -> None:
    """What the model predicts, and the scale of its timesteps, must be the patch's.

    Args:
        model_sampling: ComfyUI's, which other nodes may have changed.

    Raises:
        PatchError: it predicts something else, or counts its timesteps differently.
    """
    name, patch = record.loaded.name, record.loaded.patch
    found = prediction_of(model_sampling)
    if found != patch.variant.prediction:
        raise PatchError(
            f"{name}: expected a model with prediction type {patch.variant.prediction}, found "
            f"{found}: load the model the patch was trained for, or, if this one is the same, set "
            "its type with a ModelSampling node."
        )
    noisiest = torch.tensor([model_sampling.percent_to_sigma(0.0)])
    first = float(timesteps_of(model_sampling, patch.base, noisiest))
    if not 500.0 < first <= 1001.0:
        raise PatchError(
            f"{name}: expected a model with timesteps from 1000 (noise) to 0, found one that "
            f"starts at {first:g}: use the model sampling the patch was trained with."
        )


def require_not_compiled(model: Any, options: dict[str, Any]) -> None:
    """Models without a slot take hooks, which a compiled graph would not see.

    Raises:
        PatchError: the model is compiled.
    """
    if is_compiled(model, options):
        raise PatchError(
            f"a patch on a {type(denoiser_of(model)).__name__} needs hooks, which compiled models "
            "ignore: remove the compile node, or the patch."
        )
