"""ERNIE-Image in small, where this release of diffusers has it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import register_base
from dmp_common.bases.ernie import ErnieImage
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of the longer caption of a batch


def known() -> list[Tiny]:
    """The family, if this release of diffusers knows it."""
    return [_ernie()] if hasattr(diffusers, "ErnieImageTransformer2DModel") else []


def _ernie() -> Tiny:
    """A token for each cell of the latent; captions of two lengths, padded behind."""
    base = register_base(ErnieImage("tiny-ernie-image", depth=3, width=32, hidden=48).base())

    def build() -> nn.Module:
        return diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=48,
            in_channels=16,
            out_channels=16,
            text_in_dim=12,
            rope_axes_dim=(4, 6, 6),
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 16, *size),
            "timestep": t,
            "text_bth": noise(seed + 1, dtype, len(t), TEXT, 12),
            "text_lens": torch.tensor([TEXT - 2 * (item % 2) for item in range(len(t))]),
        }

    return Tiny("ernie-image", base, build, inputs, text=(0,))
