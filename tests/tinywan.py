"""Tiny Wan: a video of two frames, in the form of Wan 2.1 and with a timestep for each token."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import register_base
from dmp_common.bases.wan import Wan
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption
FRAMES = 2


def known() -> list[Tiny]:
    """The families this release of diffusers knows."""
    return [wan()] if hasattr(diffusers, "WanTransformer3DModel") else []


def wan() -> Tiny:
    base = register_base(
        Wan("tiny-wan", depth=2, width=32, hidden=48, channels=4, switch=875.0).base()
    )

    def build() -> nn.Module:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, FRAMES, *size),
            "timestep": t,
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
        }

    return Tiny("wan", base, build, inputs, frames=FRAMES)
