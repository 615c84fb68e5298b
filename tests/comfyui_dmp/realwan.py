"""ComfyUI's Wan in small, and its diffusers twin: a video of two frames.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch.nn as nn
from torch import Tensor

from dmp_common import register_base
from dmp_common.bases.wan import Wan
from tests.comfyui_dmp.family import Family
from tests.dmp_common.realwan import wan_names

_UNET: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 3,
    "text_dim": 16,
    "cross_attn_norm": True,
}


def known() -> list[Family]:
    """Those this release of diffusers knows: 2.1, and 2.2 with a timestep for each frame."""
    if not hasattr(diffusers, "WanTransformer3DModel"):
        return []
    return [_wan("wan", "WAN21_T2V", 16), _wan("wan22", "WAN22_T2V", 48)]


def picture() -> Family:
    """Wan 2.2's model of picture to video: beside the noise a mask and the latent of a picture."""
    return _wan("wan-picture", "WAN21_T2V", 16, beside=20)


def _wan(name: str, config: str, channels: int, beside: int = 0) -> Family:
    def twin() -> nn.Module:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=channels + beside,
            out_channels=channels,
            text_dim=16,
            ffn_dim=96,
            num_layers=3,
        )

    def keys() -> dict[str, Any]:
        return wan_names(twin().state_dict())

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}

    row = Wan(f"comfy-{name}", 3, 64, 96, channels=channels + beside, switch=875.0)
    return Family(
        name,
        register_base(row.base()),
        config,
        _UNET | {"in_dim": channels + beside, "out_dim": channels},
        twin,
        keys,
        call,
        channels=channels,
        frames=(2,),
    )
