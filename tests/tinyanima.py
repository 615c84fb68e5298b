"""Anima in small, where this release of diffusers has it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn as nn
import torch.nn.functional as F

from dmp_common import register_base
from dmp_common.bases.anima import Anima
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption
WIDTH = 12  # of the text


def is_known() -> bool:
    """Whether this release of diffusers has it."""
    return hasattr(diffusers, "AnimaTextConditioner")


def known() -> list[Tiny]:
    """The family, or nothing."""
    if not is_known():
        return []
    if importlib.util.find_spec("torchvision") is None:
        _stand_in()
    return [_anima()]


def _stand_in() -> None:
    """Lets the transformer resize its mask without torchvision."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return F.interpolate(mask, size, mode=interpolation)

    modes = SimpleNamespace(NEAREST="nearest")
    functions = SimpleNamespace(resize=resize)
    transformer_cosmos.transforms = SimpleNamespace(functional=functions, InterpolationMode=modes)


def _anima() -> Tiny:
    """A picture is a video of one frame."""
    base = register_base(
        Anima("tiny-anima", depth=2, width=32, channels=4, bottleneck=8).base(),
    )

    def build() -> nn.Module:
        return diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            text_embed_dim=WIDTH,
            adaln_lora_dim=8,
            max_size=(4, 40, 40),
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, 1, *size),
            "timestep": t / 1000,
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, WIDTH),
            "padding_mask": torch.zeros(1, 1, *size, dtype=dtype),
        }

    return Tiny("anima", base, build, inputs)
