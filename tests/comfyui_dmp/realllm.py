"""ComfyUI's models whose captions come from a language model, in small, and their twins.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import families, register_base
from tests.comfyui_dmp.family import TEXT, Family


def known() -> list[Family]:
    """Those this release of diffusers knows."""
    makers = {"QwenImageTransformer2DModel": _qwen_image}
    return [make() for kind, make in makers.items() if hasattr(diffusers, kind)]


def _qwen_image() -> Family:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 12, 12),
    }

    def twin() -> nn.Module:
        return diffusers.QwenImageTransformer2DModel(in_channels=64, out_channels=16, **sizes)

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        packed = x.reshape(len(x), 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        return {
            "hidden_states": packed.reshape(len(x), rows * columns, 64),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(len(x), TEXT, dtype=torch.bool),
            "timestep": t / 1000,
            "img_shapes": [[(1, rows, columns)]] * len(x),
        }

    def unpack(out: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = size[-2] // 2, size[-1] // 2
        out = out.reshape(len(out), rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(len(out), 16, 1, *size[-2:])

    base = families.qwen_image("comfy-qwen-image", depth=2, width=64, hub_id=None)
    return Family(
        "qwen-image",
        register_base(base),
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, **sizes},
        twin,
        lambda: {name: name for name in twin().state_dict()},
        call,
        channels=16,
        unpack=unpack,
        frames=(1,),
    )
