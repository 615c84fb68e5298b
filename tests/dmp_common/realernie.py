"""ERNIE-Image as it was released, where diffusers has it."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta

SIZE = (64, 48)  # of the packed latent


def known() -> dict[str, Real]:
    """The model, if this release of diffusers knows it."""
    if not hasattr(diffusers, "ErnieImageTransformer2DModel"):
        return {}

    def build() -> nn.Module:  # the other defaults are those of ERNIE-Image
        return diffusers.ErnieImageTransformer2DModel(
            hidden_size=4096,
            num_attention_heads=32,
            num_layers=36,
            ffn_hidden_size=12288,
            text_in_dim=3072,
        )

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 128, *SIZE),
            "timestep": meta(2),
            "text_bth": meta(2, 100, 3072),
            "text_lens": meta(2, dtype=torch.long),
        }

    def call(model: nn.Module, latent: torch.Tensor, timesteps: torch.Tensor) -> object:
        return model(latent, timesteps, meta(2, 100, 3072))

    real = Real(
        "ernie-image",
        build,
        inputs,
        SIZE,
        8_033_490_048,
        text=100,
        channels=128,
        names=lambda state: {key: key for key in state},  # ComfyUI took diffusers' names
        comfyui=("comfy.ldm.ernie.model", "ErnieImageModel"),
        call=call,
    )
    return {"ernie-image": real}
