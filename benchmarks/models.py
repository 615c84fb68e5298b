"""Full-size models with random weights, and the inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import Patch

# The configuration of the published models; only the weights are random.
SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}


def sd15(latent: int, batch: int = 1) -> tuple[nn.Module, Callable[[float], dict[str, Any]]]:
    """Stable Diffusion 1.5's UNet, and its inputs at a timestep."""
    model = diffusers.UNet2DConditionModel(**SD15)

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(batch, 4, latent, latent, generator=generator),
            "timestep": torch.full((batch,), t),
            "encoder_hidden_states": torch.randn(batch, 77, 768, generator=generator),
        }

    return model, inputs


def dit(size: str = "b", batch: int = 1) -> tuple[nn.Module, Callable[[float], dict[str, Any]]]:
    """DiT at 256 px (latent 32 x 32, 256 tokens), and its inputs at a timestep."""
    depth, heads = {"s": (12, 6), "b": (12, 12), "l": (24, 16), "xl": (28, 16)}[size]
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72 if size == "xl" else 64,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for block in model.transformer_blocks:
        # The published DiT starts at 0 (adaLN-Zero): gradients would not reach the sites.
        nn.init.normal_(block.norm1.linear.weight, std=0.02)
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, 4, 32, 32, generator=generator),
            "timestep": torch.full((batch,), t),
            "class_labels": torch.arange(batch),
        }

    return model, inputs


def random_patch(base: str, **variant: Any) -> Patch:
    """A patch with random values, in evaluation mode."""
    patch = Patch.create(base, **variant).eval()
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_(std=0.02)
    return patch


def randomised(model: nn.Module) -> nn.Module:
    """Random weights everywhere, also where a class starts at zero; frozen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = parameter.dim() == 1 and name.endswith("weight")
            std = 0.02 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(float(ones), std, generator=generator)
    return model.eval().requires_grad_(False)
