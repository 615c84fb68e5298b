"""A tiny Qwen-Image 2.1, where this release of diffusers knows it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import bases, register_base
from tests.tinymodel import Tiny, noise

TEXT, WIDTH = 5, 12  # tokens of a caption, and channels of the text encoder


def known() -> list[Tiny]:
    """The model, or nothing."""
    return [qwen21()] if hasattr(diffusers, "QwenImage21Transformer2DModel") else []


def slots(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which slots of a sequence are of the picture; each is of four of its tokens."""
    return torch.cat([torch.zeros_like(text), text.new_ones(len(text), tokens // 4)], dim=1)


def qwen21() -> Tiny:
    base = register_base(bases.qwen_image21("tiny-qwen-image-2.1", depth=2, width=32))

    def build() -> nn.Module:
        return diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        tokens, text = size[0] * size[1], torch.ones(len(t), TEXT, dtype=torch.bool)
        return {
            "hidden_states": noise(seed, dtype, len(t), tokens, 4),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, WIDTH),
            "timestep": t / 1000,
            "img_shapes": [[(1, *size)]] * len(t),
            "img_mask": slots(text, tokens),
            "encoder_hidden_states_mask": text,
        }

    return Tiny("qwen-image-2.1", base, build, inputs)
