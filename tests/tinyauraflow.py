"""AuraFlow in small."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import register_base
from dmp_common.bases.auraflow import AuraFlow
from tests.tinymodel import Tiny, noise

TEXT, REGISTERS = 5, 8  # tokens of a caption, and those before them


def known() -> list[Tiny]:
    """The family, if this release of diffusers knows it."""
    return [_auraflow()] if hasattr(diffusers, "AuraFlowTransformer2DModel") else []


def model_of(depth: int, width: int, channels: int, text: int) -> nn.Module:
    """So many blocks of each kind."""
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        num_mmdit_layers=depth,
        num_single_dit_layers=depth,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=text,
        caption_projection_dim=width,
        pos_embed_max_size=400,
    )


def _auraflow() -> Tiny:
    base = register_base(AuraFlow("tiny-auraflow", double=1, single=1, width=32).base())

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "timestep": t / 1000,
        }

    return Tiny("auraflow", base, lambda: model_of(1, 32, 4, 12), inputs)


def original_name(key: str) -> str:
    """The original name of a tensor."""
    single = key.startswith("single")
    number = "1" if single else "2"
    parts = {
        "pos_embed.pos_embed": "positional_encoding",
        "pos_embed.proj": "init_x_linear",
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "norm_out.linear": "modF.1",
        "proj_out": "final_linear",
        "joint_transformer_blocks": "double_layers",
        "single_transformer_blocks": "single_layers",
        "context_embedder": "cond_seq_linear",
        "norm1_context.linear": "modC.1",
        "norm1.linear": "modCX.1" if single else "modX.1",
        "ff_context.": "mlpC.",
        "ff.": "mlp." if single else "mlpX.",
        "linear_1": "c_fc1",
        "linear_2": "c_fc2",
        "out_projection": "c_proj",
        "to_add_out": "w1o",
        "to_out.0": f"w{number}o",
        **{f"add_{part}_proj": f"w1{part}" for part in "qkv"},
        **{f"to_{part}": f"w{number}{part}" for part in "qkv"},
    }
    for part, other in parts.items():
        key = key.replace(part, other)
    return key
