"""ComfyUI's Chroma in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.chroma.layers
import comfy.utils
import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import bases, register_base
from tests.comfyui_dmp.family import TEXT, Family, packed, unpacked
from tests.tinychroma import time_name

DEPTH = {"depth": 2, "depth_single_blocks": 2}
VECTORS = 344  # of the released model's modulation, which ComfyUI computes at any depth


def known() -> list[Family]:
    """The family, or nothing where this release of diffusers does not know it."""
    return [_chroma()] if hasattr(diffusers, "ChromaTransformer2DModel") else []


def _chroma() -> Family:
    unet = DEPTH | {
        "image_model": "chroma",
        "in_channels": 64,
        "out_channels": 64,
        "context_in_dim": 16,
        "hidden_size": 64,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "in_dim": 64,
        "out_dim": 64,
        "hidden_dim": 32,
        "n_layers": 2,
        "txt_ids_dims": [],
        "vec_in_dim": None,
    }

    def twin() -> nn.Module:
        model = diffusers.ChromaTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 12, 12),
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
        model.time_text_embed = type(model.time_text_embed)(16, VECTORS)
        return model

    def keys() -> dict[str, Any]:
        table: dict[str, Any] = comfy.utils.flux_to_diffusers(DEPTH | {"hidden_size": 64})
        old = hasattr(comfy.ldm.chroma.layers, "RMSNorm")  # newer releases have torch's own
        network = "distilled_guidance_layer"
        for name in twin().state_dict():
            if name.startswith(network):
                part = name.removeprefix(f"{network}.")
                part = time_name(part) if old else time_name(part).replace("scale", "weight")
                table[name] = f"{network}.{part}"
        return table

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": text,
            "timestep": t / 1000,
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], dim=1),
            "txt_ids": torch.zeros(TEXT, 3),
        }

    base = bases.chroma("comfy-chroma", double=2, single=2, width=64, layers=2)
    return Family(
        "chroma",
        register_base(base),
        "Chroma",
        unet,
        twin,
        keys,
        call,
        channels=16,
        unpack=lambda out, size: unpacked(out, *size[-2:]),
        conds={"guidance": torch.zeros},  # of each item
    )
