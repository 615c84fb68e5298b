"""HunyuanImage 2.1 in small."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import Base, register_base
from dmp_common.bases.hunyuanimage import HunyuanImage
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of the longer caption of a batch
GLYPHS = 3  # tokens of the text that is to be drawn


def known() -> list[Tiny]:
    """The family, if this release of diffusers knows it."""
    return [_hunyuan()] if is_known() else []


def is_known() -> bool:
    return hasattr(diffusers, "HunyuanImageTransformer2DModel")


def base_of(name: str, depth: int, width: int, channels: int, refiners: int) -> Base:
    """A base with so many blocks of each kind."""
    return register_base(HunyuanImage(name, depth, depth, width, channels, refiners).base())


def model_of(
    depth: int, width: int, channels: int, refiners: int, text: int, glyphs: int | None
) -> nn.Module:
    """The model of such a base."""
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=width // 2,
        num_layers=depth,
        num_single_layers=depth,
        num_refiner_layers=refiners,
        text_embed_dim=text,
        text_embed_2_dim=glyphs,
        rope_axes_dim=(width // 4, width // 4),
    )


def _hunyuan() -> Tiny:
    """A token for each cell of the latent; captions of two lengths, one with text to draw."""
    base = base_of("tiny-hunyuan-image", 1, 32, 4, refiners=1)

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        items = torch.arange(len(t))[:, None] % 2
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "timestep": t.to(dtype),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "encoder_attention_mask": torch.arange(TEXT) < TEXT - 2 * items,
            "encoder_hidden_states_2": noise(seed + 2, dtype, len(t), GLYPHS, 12),
            "encoder_attention_mask_2": (items == 0).expand(len(t), GLYPHS),
        }

    return Tiny(
        "hunyuan-image",
        base,
        lambda: model_of(1, 32, 4, 1, 12, 12),
        inputs,
        time_name=lambda name: original_name(f"x.{name}").removeprefix("x."),
    )


def original_name(key: str) -> str:
    """ComfyUI's name of a tensor; those of joined projections have one name."""
    single = key.startswith("single")
    norm = "norm" if single else "img_attn.norm"
    parts = {
        "x_embedder": "img_in",
        "context_embedder_2.norm": "byt5_in.layernorm",
        **{f"context_embedder_2.linear_{n}": f"byt5_in.fc{n}" for n in (1, 2, 3)},
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.timestep_embedder": "txt_in.t_embedder",
        "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
        "context_embedder.token_refiner.refiner_blocks": "txt_in.individual_token_refiner.blocks",
        "time_guidance_embed.timestep_embedder": "time_in",
        "linear_1": "in_layer",
        "linear_2": "out_layer",
        "norm_out.linear": "adaLN_modulation.1"
        if key.startswith("context")
        else "final_layer.adaLN_modulation.1",
        "proj_out": "linear2" if single else "final_layer.linear",
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "norm.linear": "modulation.lin",
        "proj_mlp": "linear1",
        "ff_context.net": "txt_mlp",
        "ff.net": "mlp" if key.startswith("context") else "img_mlp",
        "0.proj": "0",
        "attn.norm_q.weight": f"{norm}.query_norm.scale",
        "attn.norm_k.weight": f"{norm}.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_add_out": "txt_attn.proj",
        **{f"attn.add_{part}_proj": "txt_attn.qkv" for part in "qkv"},
    }
    own = "self_attn" if key.startswith("context") else "img_attn"
    parts |= {f"attn.to_{part}": "linear1" if single else f"{own}.qkv" for part in "qkv"}
    parts["attn.to_out.0"] = f"{own}.proj"
    for part, other in parts.items():
        key = key.replace(part, other)
    return key
