"""Computes the time embedding e of timesteps, with the model's own frozen weights."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.bases.base import Base, Naming, find_module
from dmp_common.bases.schedule import LAST
from dmp_common.errors import PatchError


def sinusoid(
    timesteps: Tensor, channels: int, shift: float = 0.0, sines_first: bool = False
) -> Tensor:
    """Returns sinusoidal features of timesteps, cosines first.

    Args:
        timesteps: (T,), on the scale 0..1000; may be fractional.
        channels: size of the result, even.
        shift: diffusers' `downscale_freq_shift`; 0 in the original LDM and DiT code.
        sines_first: whether the sines come first.

    Returns:
        (T, channels), float32.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * steps / (half - shift))
    halves = [angles.cos(), angles.sin()]
    return torch.cat(halves[::-1] if sines_first else halves, dim=-1)


def time_features(timesteps: Tensor, base: Base, shift: float = 0.0) -> Tensor:
    """Returns the sinusoid that the time embedding of a base's models is computed from.

    Args:
        timesteps: (T,), on the scale 0..1000.
        shift: the frequency shift, see `sinusoid`.

    Returns:
        (T, channels), float32, with those of the base's constants.
    """
    times = LAST - timesteps if base.inverted else timesteps
    own = sinusoid(times * base.sinusoid_scale, base.sinusoid, shift, base.sines_first)
    if not base.time_constants:
        return own
    constant = [
        sinusoid(torch.full_like(times, number), channels, shift, base.sines_first)
        for number, channels in base.time_constants
    ]
    return torch.cat([own, *constant], dim=-1)


def embedded(
    mlp: nn.Module, base: Base, naming: Naming, timesteps: Tensor, shift: float, dtype: torch.dtype
) -> Tensor:
    """Returns the time embedding that a module of a model makes of timesteps.

    Args:
        mlp: the module, see `TimeSource.mlp`.
        timesteps: (T,), on the scale 0..1000.
        shift: the frequency shift, see `sinusoid`.
        dtype: what the module computes in.

    Returns:
        e (T, E).
    """
    source = base.times[naming]
    if source.own_sinusoid:
        return source.embedding(mlp(source.values(timesteps), dtype))
    return source.embedding(mlp(time_features(timesteps, base, shift).to(dtype)))


def embed_timesteps(
    model: nn.Module, base: Base, naming: Naming, timesteps: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Returns the time embedding of a model for any timesteps, for heat maps and losses.

    Args:
        model: the denoiser itself (a UNet or transformer, not a pipeline).
        timesteps: (T,), on the scale 0..1000.
        labels: (T,) class labels, for patches with condition t+y; their embedding is added.

    Returns:
        e (T, E), in the dtype of the model's time embedding.

    Raises:
        PatchError: the model has no such time embedding, or no class labels.
    """
    source = base.times[naming]
    mlp = find_module(model, source.mlp)
    if mlp is None:
        raise PatchError(
            f"expected the time embedding of base {base.name} at {source.mlp}, found no such "
            f"module in a {type(model).__name__}: give the denoiser this patch was made for."
        )
    weight = next(mlp.parameters())
    shift = frequency_shift(model, base, naming)
    e = embedded(mlp, base, naming, timesteps.to(weight.device), shift, weight.dtype)
    if labels is None:
        return e
    table = find_module(model, f"{source.labels}.embedding_table")
    if table is None:
        raise PatchError(f"base {base.name} has no class labels: use a patch with condition t.")
    conditioning: Tensor = e + table(labels.to(weight.device))
    return conditioning


def frequency_shift(model: nn.Module, base: Base, naming: Naming) -> float:
    """Returns the `downscale_freq_shift` that the model really uses."""
    path = base.times[naming].projection
    module = find_module(model, path) if path else None
    # In the original code the sinusoid is a function, not a module, and has shift 0.
    return float(getattr(module, "downscale_freq_shift", 0.0))
