"""A tiny Krea 2, where this release of diffusers knows it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import Base, bases, register_base
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption
LAYERS, WIDTH = 12, 12  # of the text encoder: layers that are read, and their channels


def known() -> list[Tiny]:
    """The model, or nothing."""
    return [krea2()] if hasattr(diffusers, "Krea2Transformer2DModel") else []


def base_of(name: str, width: int, hidden: int, text: tuple[int, int]) -> Base:
    """The base of a model of two blocks, of which one head of two has keys."""
    facts = {"depth": 2, "width": width, "keys": width // 2, "hidden": hidden, "text": text}
    return register_base(bases.krea2(name, **facts))


def model_of(head: int, hidden: int, channels: int, text: tuple[int, int]) -> nn.Module:
    """The model, with heads of so many channels."""
    return diffusers.Krea2Transformer2DModel(
        in_channels=channels,
        num_layers=2,
        attention_head_dim=head,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=hidden,
        text_hidden_dim=text[0],
        num_text_layers=LAYERS,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=text[1],
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )


def position_ids(text: int, rows: int, columns: int) -> torch.Tensor:
    """Those of the caption, which are 0, and those of the picture."""
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(text, 3), grid])


def krea2() -> Tiny:
    def build() -> nn.Module:
        return model_of(16, 48, 16, (WIDTH, 20))

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        rows, columns = size[0] // 2, size[1] // 2
        return {
            "hidden_states": noise(seed, dtype, len(t), rows * columns, 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, LAYERS, WIDTH),
            "timestep": t / 1000,
            "position_ids": position_ids(TEXT, rows, columns),
            "encoder_attention_mask": torch.ones(len(t), TEXT, dtype=torch.bool),
        }

    base = base_of("tiny-krea2", 32, 48, (WIDTH, 20))
    return Tiny("krea2", base, build, inputs, time_name=time_name)


def time_name(name: str) -> str:
    """The original name of a tensor of the time embedding."""
    return name.replace("linear_1", "0").replace("linear_2", "2")


def original_name(key: str) -> str:
    """The original name of a tensor."""
    for part, other in {
        "transformer_blocks": "blocks",
        "text_fusion": "txtfusion",
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.norm.weight": "txtmlp.0.scale",
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "final_layer.norm.weight": "last.norm.scale",
        "final_layer.linear": "last.linear",
        "final_layer.scale_shift_table": "last.modulation.lin",
        "scale_shift_table": "mod.lin",
        "norm1.weight": "prenorm.scale",
        "norm2.weight": "postnorm.scale",
        "norm_q.weight": "qknorm.qnorm.scale",
        "norm_k.weight": "qknorm.knorm.scale",
        **{f"attn.to_{kind}.": f"attn.w{kind}." for kind in "qkv"},
        "to_gate": "gate",
        "to_out.0": "wo",
        ".ff.": ".mlp.",
    }.items():
        key = key.replace(part, other)
    return key
