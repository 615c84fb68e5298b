"""HunyuanImage 2.1, where diffusers has it."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta
from tests.tinyhunyuanimage import is_known, original_name


def known() -> dict[str, Real]:
    """The model, or nothing."""
    return {"hunyuan-image": _hunyuan()} if is_known() else {}


def _hunyuan() -> Real:
    def build() -> nn.Module:  # the other defaults are those of HunyuanImage 2.1
        return diffusers.HunyuanImageTransformer2DModel(text_embed_2_dim=1472)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64, 64, 48),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, 100, 3584),
            "encoder_attention_mask": meta(2, 100, dtype=torch.bool),
        }

    def call(model: nn.Module, latent: torch.Tensor, timesteps: torch.Tensor) -> object:
        return model(latent, timesteps, meta(2, 100, 3584))

    return Real(
        "hunyuan-image",
        build,
        inputs,
        (64, 48),
        17_425_795_520,
        text=100,
        channels=64,
        names=lambda state: {key: original_name(key) for key in state},
        comfyui=("comfy.ldm.hunyuan_video.model", "HunyuanVideo"),
        call=call,
    )
