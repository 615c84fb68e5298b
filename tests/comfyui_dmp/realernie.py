"""ComfyUI's ERNIE-Image in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import register_base
from dmp_common.bases.ernie import ErnieImage
from tests.comfyui_dmp.family import Family


def known() -> list[Family]:
    """The family, if these releases of diffusers and ComfyUI know it."""
    there = hasattr(diffusers, "ErnieImageTransformer2DModel")
    return [_ernie()] if there and hasattr(comfy.supported_models, "ErnieImage") else []


def _ernie() -> Family:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "text_in_dim": 16,
        "rope_axes_dim": (8, 12, 12),
    }

    def twin() -> nn.Module:
        return diffusers.ErnieImageTransformer2DModel(**sizes)

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        lengths = torch.full((len(x),), text.shape[1])
        return {"hidden_states": x, "timestep": t, "text_bth": text, "text_lens": lengths}

    return Family(
        "ernie-image",
        register_base(ErnieImage("comfy-ernie-image", depth=2, width=64, hidden=96).base()),
        "ErnieImage",
        {"image_model": "ernie", **sizes},
        twin,
        lambda: {name: name for name in twin().state_dict()},
        call,
        channels=128,
    )
