"""A tiny Chroma, where this release of diffusers knows it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import bases, register_base
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption


def known() -> list[Tiny]:
    """The model, or nothing."""
    return [chroma()] if hasattr(diffusers, "ChromaTransformer2DModel") else []


def chroma() -> Tiny:
    base = register_base(bases.chroma("tiny-chroma", double=2, single=2, width=32, layers=2))

    def build() -> nn.Module:
        return diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=24,
            approximator_layers=2,
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        rows, columns = size[0] // 2, size[1] // 2
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": noise(seed, dtype, len(t), rows * columns, 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "timestep": t / 1000,
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], dim=1).to(dtype),
            "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
            "attention_mask": torch.ones(len(t), TEXT + rows * columns, dtype=dtype),
        }

    return Tiny("chroma", base, build, inputs, time_name=time_name)


def time_name(name: str) -> str:
    """The original name of a tensor of the network that makes the modulation."""
    name = name.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
    return name.replace("weight", "scale") if name.startswith("norms") else name


def original_name(key: str) -> str:
    """The original name of a tensor; those of joined projections have one name."""
    head, _, rest = key.partition(".")
    if head == "distilled_guidance_layer":
        return f"{head}.{time_name(rest)}"
    parts = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    if head in parts:
        return f"{parts[head]}.{rest}"
    number, _, path = rest.partition(".")
    norm = "norm" if head.startswith("single") else "img_attn.norm"
    for part, other in {
        "proj_mlp": "linear1",
        "proj_out": "linear2",
        "ff.net": "img_mlp",
        "ff_context.net": "txt_mlp",
        "0.proj": "0",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.norm_q.weight": f"{norm}.query_norm.scale",
        "attn.norm_k.weight": f"{norm}.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        **{f"attn.to_{k}": "linear1" if norm == "norm" else "img_attn.qkv" for k in "qkv"},
        **{f"attn.add_{kind}_proj": "txt_attn.qkv" for kind in "qkv"},
    }.items():
        path = path.replace(part, other)
    return f"{'single' if norm == 'norm' else 'double'}_blocks.{number}.{path}"
