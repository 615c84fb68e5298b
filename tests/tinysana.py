"""Sana in small."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import register_base
from dmp_common.bases.sana import Sana
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of the longer caption of a batch


def known() -> list[Tiny]:
    """The family, if this release of diffusers knows it."""
    return [_sana()] if hasattr(diffusers, "SanaTransformer2DModel") else []


def _sana() -> Tiny:
    base = register_base(Sana("tiny-sana", depth=2, width=32, hidden=48).base())

    def build() -> nn.Module:
        return diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=12,
            mlp_ratio=1.5,
            sample_size=8,
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        items = torch.arange(len(t))[:, None] % 2
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "timestep": t,
            "encoder_attention_mask": torch.arange(TEXT) < TEXT - 2 * items,
        }

    return Tiny("sana", base, build, inputs)
