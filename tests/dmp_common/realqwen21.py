"""Qwen-Image 2.1, where diffusers has it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta
from tests.tinyqwen21 import slots


def known() -> dict[str, Real]:
    """The model, or nothing."""
    kind = "QwenImage21Transformer2DModel"
    return {"qwen-image-2.1": _qwen21()} if hasattr(diffusers, kind) else {}


def _on_meta(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The layout of a sequence is computed from a mask with values; the rest has none."""

    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}


def _qwen21() -> Real:
    def build() -> nn.Module:  # the defaults are those of Qwen-Image 2.1
        model = diffusers.QwenImage21Transformer2DModel()
        for part in (*model.transformer_blocks, model.norm_out):
            part.register_forward_pre_hook(_on_meta, with_kwargs=True)
        return model

    def inputs() -> dict:
        text = torch.ones(2, 100, dtype=torch.bool)
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 100, 4096),
            "timestep": meta(2),
            "img_shapes": [[(1, 64, 48)]] * 2,
            "img_mask": slots(text, 64 * 48),
            "encoder_hidden_states_mask": text,
        }

    size, parameters = (64, 48), 7_115_124_736
    return Real("qwen-image-2.1", build, inputs, size, parameters, text=100, unit_time=True)
