"""Checks that a patch fits a ComfyUI model, with the error messages for those that do not."""

from __future__ import annotations

from typing import Any

import torch

from comfyui_dmp.model import denoiser_of, is_compiled, timesteps_of
from dmp_common import Patch, PatchError
from dmp_common.attach.compatibility import require_compatible
from dmp_common.attach.record import PatchRecord
from dmp_common.bases.detect import prediction_of


def require_fitting(model: Any, model_sampling: Any, record: PatchRecord) -> None:
    """Checks that a model is the one that a patch was trained for.

    Args:
        model: ComfyUI's `BaseModel`.
        model_sampling: ComfyUI's object of this name, which other nodes may have replaced.
        record: the patch.

    Raises:
        PatchError: the base, the time embedding, the prediction type or the timesteps are not the
            patch's, or the patch prepends its prompts.
    """
    variant = record.loaded.patch.variant
    try:
        noisiest = torch.tensor([model_sampling.percent_to_sigma(0.0)])
        require_compatible(
            denoiser_of(model),
            variant,
            naming="ldm",
            prediction=prediction_of(model_sampling),
            noisiest=float(timesteps_of(model_sampling, variant.base_spec, noisiest)),
        )
    except PatchError as error:
        raise PatchError(f"{record.loaded.name}: {error}") from error


def require_references(patch: Patch) -> None:
    """Refuses a modulating patch where the node Flux KV Cache keeps keys and values of reference
    pictures: the patch changes them at every step, and those of the first would stay.

    Raises:
        PatchError: the patch modulates.
    """
    if patch.modulates:
        raise PatchError(
            "expected a model without Flux KV Cache for this patch, which changes the keys and "
            "values of reference pictures at every step, found that node: remove it, or use a "
            "patch that adds its prompts."
        )


def require_not_compiled(model: Any, options: dict[str, Any]) -> None:
    """Checks that a model which needs hooks is not compiled: a compiled graph ignores hooks.

    Args:
        model: ComfyUI's `BaseModel`.
        options: the `transformer_options` of the call.

    Raises:
        PatchError: the model is compiled.
    """
    if is_compiled(model, options):
        raise PatchError(
            f"this patch needs hooks on a {type(denoiser_of(model)).__name__}, which compiled "
            "models ignore: remove the compile node, or the patch."
        )
