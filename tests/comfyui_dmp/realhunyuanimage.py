"""ComfyUI's HunyuanImage 2.1 in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.flux.layers
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch.nn as nn
from torch import Tensor

from tests.comfyui_dmp.family import Family
from tests.tinyhunyuanimage import base_of, is_known, model_of, original_name

# The order of the parts of a joined projection.
_PARTS = {"to_q": 0, "to_k": 1, "to_v": 2, "proj_mlp": 3, "add_k_proj": 1, "add_v_proj": 2}


def known() -> list[Family]:
    """The family, or nothing where diffusers or ComfyUI do not know it."""
    there = hasattr(comfy.supported_models, "HunyuanImage21")
    return [_hunyuan()] if there and is_known() else []


def _hunyuan() -> Family:
    unet = {
        "image_model": "hunyuan_video",
        "in_channels": 64,
        "out_channels": 64,
        "patch_size": [1, 1],
        "vec_in_dim": None,
        "context_in_dim": 16,
        "hidden_size": 64,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [16, 16],
        "theta": 256,
        "qkv_bias": True,
        "guidance_embed": False,
        "byt5": False,
        "meanflow": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    }

    def twin() -> nn.Module:
        return model_of(2, 64, 64, 2, 16, None)

    def keys() -> dict[str, Any]:
        norm = comfy.ldm.flux.layers.QKNorm(2, operations=comfy.ops.disable_weight_init)
        last = next(iter(norm.state_dict())).rpartition(".")[2]  # newer releases have torch's
        table: dict[str, Any] = {}
        for key in twin().state_dict():
            name = original_name(key).replace("norm.scale", f"norm.{last}")
            swap = comfy.utils.swap_scale_shift if name.startswith("final_layer.ada") else None
            place = (0, _PARTS.get(key.split(".")[-2], 0), 0)
            table[key] = (name, place, swap) if swap else (name, place)
        return table

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "timestep": t,
            "encoder_hidden_states": text,
            "encoder_attention_mask": text.new_ones(text.shape[:2]),
        }

    return Family(
        "hunyuan-image",
        base_of("comfy-hunyuan-image", 2, 64, 64, refiners=2),
        "HunyuanImage21",
        unet,
        twin,
        keys,
        call,
        channels=64,
    )
