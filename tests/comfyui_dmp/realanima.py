"""ComfyUI's Anima in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import comfy.supported_models
import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import register_base
from dmp_common.bases.anima import Anima
from tests.comfyui_dmp.family import Family
from tests.dmp_common.realanima import original_names
from tests.tinyanima import is_known


def known() -> list[Family]:
    """The family, if these releases of diffusers and ComfyUI know it."""
    there = is_known() and hasattr(comfy.supported_models, "Anima")
    return [_anima()] if there else []


def _anima() -> Family:
    """The adapter of the text encoder is made smaller: it would take half a gigabyte, and takes no
    part in these calls."""
    from comfy.ldm.anima.model import LLMAdapter

    narrow = partial(
        LLMAdapter, source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_heads=2
    )
    unet: dict[str, Any] = {
        "image_model": "anima",
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 64,
        "num_blocks": 2,
        "num_heads": 2,
        "concat_padding_mask": True,
        "crossattn_emb_channels": 16,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "use_adaln_lora": True,
        "adaln_lora_dim": 8,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_enable_fps_modulation": False,
    }

    def twin() -> nn.Module:
        return diffusers.CosmosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=2,
            text_embed_dim=16,
            adaln_lora_dim=8,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        )

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        mask = torch.zeros(1, 1, *x.shape[-2:])
        return {
            "hidden_states": x, "timestep": t / 1000, "encoder_hidden_states": text,
            "padding_mask": mask,
        }  # fmt: skip

    return Family(
        "anima",
        register_base(Anima("comfy-anima", depth=2, width=64, bottleneck=8).base()),
        "Anima",
        unet,
        twin,
        lambda: original_names(twin().state_dict()),
        call,
        channels=16,
        frames=(1,),
        building=lambda: mock.patch("comfy.ldm.anima.model.LLMAdapter", narrow),
    )
