"""Tiny models of the families whose captions come from a language model.

Old releases of diffusers do not have them; `known` gives those that this one has.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import families, register_base
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption


def known() -> list[Tiny]:
    """The families this release of diffusers knows."""
    makers = {"QwenImageTransformer2DModel": qwen_image}
    return [make() for name, make in makers.items() if hasattr(diffusers, name)]


def qwen_image() -> Tiny:
    base = register_base(families.qwen_image("tiny-qwen-image", depth=2, width=32, hub_id=None))

    def build() -> nn.Module:
        return diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        rows, columns = size[0] // 2, size[1] // 2
        return {
            "hidden_states": noise(seed, dtype, len(t), rows * columns, 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "encoder_hidden_states_mask": torch.ones(len(t), TEXT, dtype=torch.bool),
            "timestep": t / 1000,
            "img_shapes": [[(1, rows, columns)]] * len(t),
        }

    return Tiny("qwen-image", base, build, inputs)
