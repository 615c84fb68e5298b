"""Released Wan models, where diffusers has them, and the original names of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

from tests.dmp_common.realmodel import Real, meta

LATENT, FRAMES, TEXT = (60, 104), 3, 512
I2V: dict[str, Any] = {"in_channels": 36}
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "wan-1.3b": (1_418_996_800, dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
    "wan-14b": (14_288_491_584, {}),
    "wan21-i2v-14b": (16_394_878_784, I2V | dict(image_dim=1280, added_kv_proj_dim=5120)),
    "wan22-i2v-14b": (14_288_901_184, I2V),
    "wan22-5b": (
        4_999_787_712,
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    ),
}


def known() -> dict[str, Real]:
    """Those this release of diffusers knows."""
    if not hasattr(diffusers, "WanTransformer3DModel"):
        return {}
    return {name: _real(name, *facts) for name, facts in CONFIGS.items()}


def _real(name: str, parameters: int, config: dict[str, Any]) -> Real:
    channels = config.get("in_channels", 16)

    def build() -> nn.Module:
        return diffusers.WanTransformer3DModel(**config)

    def inputs() -> dict[str, Any]:
        pictures = {"encoder_hidden_states_image": meta(2, 257, 1280)}
        return {
            "hidden_states": meta(2, channels, FRAMES, *LATENT),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, TEXT, 4096),
        } | (pictures if "image_dim" in config else {})

    return Real(name, build, inputs, LATENT, parameters, channels=channels, frames=FRAMES)


def host_call(name: str) -> Callable[[nn.Module], object]:
    """A call of ComfyUI's class of a released model."""
    real = _real(name, *CONFIGS[name])
    given = real.inputs()

    def call(model: nn.Module) -> object:
        picture = given.get("encoder_hidden_states_image")
        text = given["encoder_hidden_states"]
        return model(given["hidden_states"], given["timestep"], text, clip_fea=picture)

    return call


def wan_names(state: dict[str, Tensor]) -> dict[str, str]:
    """The original names of parameters, which diffusers' own converter proves."""
    parts = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "proj_out": "head.head",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "add_k_proj": "k_img",
        "add_v_proj": "v_img",
        "norm_added_k": "norm_k_img",
        "to_": "",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        ".norm2": ".norm3",
    }
    names = {}
    for key in state:
        original = key.replace("scale_shift_table", "modulation")
        original = f"head.{original}" if original == "modulation" else original
        for part, other in parts.items():
            original = original.replace(part, other)
        names[key] = original
    converted = single_file.convert_wan_transformer_to_diffusers(
        {original: original for original in names.values()}
    )
    assert converted == names
    return names
