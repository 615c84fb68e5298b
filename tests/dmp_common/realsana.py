"""Sana 1.6B and 0.6B, where diffusers has them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta

CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "sana": (1_604_462_752, {}),  # the defaults
    "sana-0.6b": (
        591_747_872,
        dict(
            num_attention_heads=36,
            num_layers=28,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
        ),
    ),
}


def known() -> dict[str, Real]:
    """The models, or nothing."""
    if not hasattr(diffusers, "SanaTransformer2DModel"):
        return {}
    return {name: _real(name, *facts) for name, facts in CONFIGS.items()}


def _real(name: str, parameters: int, config: dict[str, Any]) -> Real:
    def build() -> nn.Module:
        return diffusers.SanaTransformer2DModel(**config)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 32, 32, 24),
            "encoder_hidden_states": meta(2, 300, 2304),
            "timestep": meta(2),
            "encoder_attention_mask": meta(2, 300, dtype=torch.bool),
        }

    return Real(name, build, inputs, (32, 24), parameters, channels=32)
