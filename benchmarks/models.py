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
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

Inputs = Callable[[float], dict[str, Any]]


def sd15(latent: int, batch: int = 1) -> tuple[nn.Module, Inputs]:
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


def sdxl(latent: int, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """SDXL's UNet, and its inputs at a timestep."""
    model = diffusers.UNet2DConditionModel(**SDXL)

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        side = 8.0 * latent
        return {
            "sample": torch.randn(batch, 4, latent, latent, generator=generator),
            "timestep": torch.full((batch,), t),
            "encoder_hidden_states": torch.randn(batch, 77, 2048, generator=generator),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, 1280, generator=generator),
                "time_ids": torch.tensor([side, side, 0.0, 0.0, side, side]).repeat(batch, 1),
            },
        }

    return model, inputs


def dit(size: str = "b", batch: int = 1) -> tuple[nn.Module, Inputs]:
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


def sd3(latent: int, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 3 medium's transformer, and its inputs at a timestep."""
    model = diffusers.SD3Transformer2DModel(**SD3)

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, 16, latent, latent, generator=generator),
            "timestep": torch.full((batch,), t),
            "encoder_hidden_states": torch.randn(batch, 154, 4096, generator=generator),
            "pooled_projections": torch.randn(batch, 2048, generator=generator),
        }

    return model, inputs


def flux(latent: int, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """FLUX.1-dev's transformer, and its inputs at a timestep from 0 to 1000."""
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    side = latent // 2

    def inputs(t: float) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        return {
            "hidden_states": torch.randn(batch, side * side, 64, generator=generator),
            "timestep": torch.full((batch,), t / 1000.0),
            "encoder_hidden_states": torch.randn(batch, 512, 4096, generator=generator),
            "pooled_projections": torch.randn(batch, 768, generator=generator),
            "img_ids": torch.cat([torch.zeros(len(places), 1), places], dim=1),
            "txt_ids": torch.zeros(512, 3),
            "guidance": torch.full((batch,), 3.5),
        }

    return model, inputs


# By the name of the base: (side of the latent, batch) -> model and inputs. DiT has one size.
MODELS: dict[str, Callable[[int, int], tuple[nn.Module, Inputs]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "dit-b/2": lambda latent, batch: dit("b", batch),
    "dit-xl/2": lambda latent, batch: dit("xl", batch),
    "sd3": sd3,
    "flux": flux,
}


def placed(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Inputs on a device, in the model's precision; timesteps keep theirs, as pipelines do."""
    if isinstance(value, dict):
        return {
            name: each.to(device) if name == "timestep" else placed(each, device, dtype)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [placed(each, device, dtype) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def build(
    base: str, latent: int, batch: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[nn.Module, Inputs]:
    """A frozen full-size model made on a device, and its inputs there; the same with each call."""
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # Flux has 12 billion weights: float32 would be 48 GB
    try:
        with torch.device(device):
            model, inputs = MODELS[base](latent, batch)
    finally:
        torch.set_default_dtype(usual)
    # Tables of positions are computed by numpy, so they are on the CPU and in float32. The method
    # of diffusers' own class warns of modules to keep in float32, also where there are none.
    model = nn.Module.to(model, device, dtype).eval().requires_grad_(False)
    return model, lambda t: placed(inputs(t), device, dtype)


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
