"""ComfyUI's own model classes in small, and their diffusers twins with the same weights.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import bases, register_base
from tests.comfyui_dmp.family import TEXT, Family, noise, packed, randomised, unpacked
from tests.discovery import modules

__all__ = ["FAMILIES", "noise", "randomised"]


def _unet(name: str, config: str, widths: tuple[int, ...], attention: str, xl: bool) -> Family:
    levels = [int(char) for char in attention]
    depth = [level for level in levels for _ in range(2)]
    unet = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "num_res_blocks": [2] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": depth,
        "transformer_depth_middle": max(levels[-1], 1),
        "transformer_depth_output": [level for level in levels for _ in range(3)],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": xl,
        "context_dim": 16,
        "legacy": False,
        "adm_in_channels": None,
    }
    # Heads: ComfyUI fixes 8 of them for SD 1.5, and 64 channels each for SDXL.
    extra: dict[str, Any] = {"attention_head_dim": 8}
    if xl:
        unet |= {"num_classes": "sequential", "adm_in_channels": 12 + 6 * 256}
        extra = {
            "attention_head_dim": tuple(width // 64 for width in widths),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 12 + 6 * 256,
            "use_linear_projection": True,
            "transformer_layers_per_block": tuple(max(level, 1) for level in levels),
        }

    def twin() -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=widths,
            down_block_types=["CrossAttn" * bool(a) + "DownBlock2D" for a in levels],
            up_block_types=["CrossAttn" * bool(a) + "UpBlock2D" for a in reversed(levels)],
            cross_attention_dim=16,
            **extra,
        )

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {"sample": x, "timestep": t, "encoder_hidden_states": text}
        if xl:
            height, width = 8 * x.shape[2], 8 * x.shape[3]
            ids = torch.tensor([height, width, 0, 0, height, width]).expand(len(x), 6)
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.float()}
        return arguments

    base = bases.unet(
        f"comfy-{name}",
        widths=widths,
        context=16,
        attention=[bool(level) for level in levels],
        prediction="v_prediction" if name == "sd21" else "epsilon",
        transformers=[max(level, 1) for level in levels],
        linear=xl,
    )
    return Family(
        name,
        register_base(base),
        config,
        unet,
        twin,
        lambda: comfy.utils.unet_to_diffusers(unet),
        call,
        adm=xl,
    )


def _sd3(name: str, dual: bool) -> Family:
    unet = {
        "in_channels": 16,
        "depth": 2,
        "num_blocks": 3,
        "patch_size": 2,
        "pos_embed_scaling_factor": None,
        "pos_embed_max_size": 24,
        "num_patches": 24 * 24,
        "adm_in_channels": 12,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 16, "out_features": 128},
        },
        "x_block_self_attn_layers": [0] if dual else [],
    }

    def twin() -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            num_layers=3,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=128,
            pooled_projection_dim=12,
            out_channels=16,
            pos_embed_max_size=24,
            dual_attention_layers=(0,) if dual else (),
        )

    def keys() -> dict[str, Any]:
        # ComfyUI's table takes the last block from the depth; ours has another count.
        table = comfy.utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 3})
        for end in ("weight", "bias"):
            plain = "joint_blocks.1.context_block.adaLN_modulation.1." + end
            table[f"transformer_blocks.1.norm1_context.linear.{end}"] = plain
            last = "joint_blocks.2.context_block.adaLN_modulation.1." + end
            swapped = (last, None, comfy.utils.swap_scale_shift)
            table[f"transformer_blocks.2.norm1_context.linear.{end}"] = swapped
        return table

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": t,
        }

    base = register_base(
        bases.sd3(f"comfy-{name}", depth=3, width=128, dual=dual, dual_blocks=1, hub_id=None)
    )
    return Family(name, base, "SD3", unet, twin, keys, call, channels=16)


def _flux() -> Family:
    unet = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 12,
        "context_in_dim": 16,
        "hidden_size": 64,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
    }

    def twin() -> nn.Module:
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=12,
            axes_dims_rope=(8, 12, 12),
        )

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": t / 1000,
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], dim=1),
            "txt_ids": torch.zeros(text.shape[1], 3),
        }

    def unpack(out: Tensor, size: tuple[int, int]) -> Tensor:
        return unpacked(out, *size)

    base = register_base(bases.flux("comfy-flux", double=2, single=2, width=64, hub_id=None))
    keys = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 64}
    return Family(
        "flux",
        base,
        "Flux",
        unet,
        twin,
        lambda: comfy.utils.flux_to_diffusers(keys),
        call,
        channels=16,
        unpack=unpack,
    )


def _pixart() -> Family:
    unet = {
        "image_model": "pixart_sigma",
        "in_channels": 4,
        "input_size": 64,
        "patch_size": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 3,
        "caption_channels": 16,
        "model_max_length": TEXT,
        "micro_condition": False,
        "pe_interpolation": 1.0,
    }

    def twin() -> nn.Module:
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            sample_size=64,
            patch_size=2,
            caption_channels=16,
            interpolation_scale=1,
            use_additional_conditions=False,
        )

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "timestep": t,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    base = register_base(bases.pixart("comfy-pixart", depth=3, width=32, hub_id=None))
    return Family(
        "pixart",
        base,
        "PixArtSigma",
        unet,
        twin,
        lambda: comfy.utils.pixart_to_diffusers({"depth": 3, "hidden_size": 32}),
        call,
        size=(64, 64),
        unpack=lambda out, size: out[:, :4],
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _unet("sd15", "SD15", (32, 64, 64, 64), "1110", xl=False),
        _unet("sdxl", "SDXL", (64, 128, 192), "012", xl=True),
        _sd3("sd3", dual=False),
        _sd3("sd35", dual=True),
        _flux(),
        _pixart(),
        *(one for module in modules("tests.comfyui_dmp", "real") for one in module.known()),
    )
}
