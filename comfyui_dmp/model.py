"""Reads the facts about a ComfyUI model that a patch needs: its parts, timesteps and sizes."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from comfyui_dmp.slots import SUPPORTED, module_at
from dmp_common import Base, PatchError
from dmp_common.bases.base import Latent, ModelCall
from dmp_common.bases.detect import prediction_of
from dmp_common.bases.timesteps import embedded
from dmp_common.patch.noise import is_pure_noise

# The names of the wrappers that compile nodes add (comfy_api.torch_helpers, and KJNodes likewise).
_APPLY_MODEL, _COMPILE_KEY = "apply_model", "torch.compile"
_KV_CACHE = "KV_Attn_Input"  # what the node Flux KV Cache puts on the attention


def denoiser_of(model: Any) -> nn.Module:
    """Returns the UNet or transformer of a `BaseModel`, also while a compiled one replaces it."""
    denoiser = getattr(model, "diffusion_model", None)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if not isinstance(denoiser, nn.Module):
        raise PatchError(
            f"expected a diffusion model, found {type(model).__name__}: connect the MODEL output "
            f"of a loader (supported: {SUPPORTED})."
        )
    return denoiser


def time_embedding(model: Any, base: Base, timesteps: Tensor) -> Tensor:
    """Returns the pure time embedding of a ComfyUI model, in the precision it computes in.

    It equals the model's own embedding: in v0.8.0 SD3, Lumina 2 and Z-Image (`mmdit.py`,
    TimestepEmbedder), Flux (`flux/model.py`, `time_in`) and Qwen-Image (`qwen_image/model.py`)
    cast the same float32 sinusoid to the model's type.

    Args:
        model: ComfyUI's `BaseModel`.
        base: the base of the model.
        timesteps: (T,), on the scale 0..1000.

    Returns:
        e (T, E), on the device of the timesteps.
    """
    mlp = module_at(denoiser_of(model), base.times["ldm"].mlp)
    dtype = getattr(model, "manual_cast_dtype", None) or model.get_dtype()
    return embedded(mlp, base, "ldm", timesteps, 0.0, dtype)


def is_compiled(model: Any, options: dict[str, Any]) -> bool:
    """Tells whether a model, or a part of it, runs compiled in a call with these options."""
    wrappers = options.get("wrappers", {}).get(_APPLY_MODEL, {})
    return bool(wrappers.get(_COMPILE_KEY)) or hasattr(model.diffusion_model, "_orig_mod")


def kept_references(options: dict[str, Any]) -> bool | None:
    """Tells whether the node Flux KV Cache has kept what the model makes of reference pictures,
    which leave the sequence then.

    Args:
        options: the `transformer_options` of a call.

    Returns:
        None where there is no such node.
    """
    patches = options.get("patches", {}).get("attn1_patch", [])
    found = [patch for patch in patches if type(patch).__name__ == _KV_CACHE]
    return any(patch.cache for patch in found) if found else None


def timesteps_of(model_sampling: Any, base: Base, sigmas: Tensor) -> Tensor:
    """Returns the timesteps (B,) on the scale 0..1000 of sigmas (B,)."""
    return base.times["ldm"].timesteps(model_sampling.timestep(sigmas).float())


def timesteps_of_call(
    model: Any, base: Base, x: Tensor, sigmas: Tensor, conds: dict[str, Any]
) -> Tensor:
    """Returns the timesteps (B,) of a call, or of each frame of each item of a video (B*F,).

    Wan 2.2 TI2V-5B gives a frame that its mask keeps clean the timestep 0.

    Args:
        model: ComfyUI's `BaseModel`.
        base: its base.
        x: noisy latents (B, C, ..., H, W).
        sigmas: (B,).
        conds: the other arguments of the call.
    """
    timesteps = timesteps_of(model.model_sampling, base, sigmas)
    if conds.get("denoise_mask") is None:
        return timesteps
    own: Tensor = model.process_timestep(timesteps, x=x, **conds)
    return own.reshape(-1)


def zero_terminal_snr(model_sampling: Any) -> bool | None:
    """Tells whether a model's noise schedule ends in pure noise (zero terminal SNR).

    It is None for models whose schedule cannot, such as flow models.

    Args:
        model_sampling: ComfyUI's object of this name.
    """
    if prediction_of(model_sampling) not in ("epsilon", "v_prediction"):
        return None
    return is_pure_noise(float(model_sampling.sigma_max))


def latent_of(model: Any, base: Base, x: Tensor, conds: dict[str, Any]) -> Latent:
    """Returns the latents of a call of a ComfyUI model, as its transformer will see them.

    Args:
        model: ComfyUI's `BaseModel`.
        x: noisy latents (B, C, H, W).
        conds: other arguments of the call; they reach the transformer by name, among them
            `ref_latents`, the reference pictures of Kontext and Qwen-Image-Edit.
    """
    if base.layout == "map":
        return Latent(len(x), (x.shape[-2], x.shape[-1]))
    return base.latent["ldm"](base, ModelCall((x,), conds), denoiser_of(model))
