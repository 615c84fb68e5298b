"""Krea 2, where diffusers has it."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file

from tests.dmp_common.realmodel import Real, meta
from tests.tinykrea2 import original_name


def known() -> dict[str, Real]:
    """The model, or nothing."""
    return {"krea2": _krea2()} if hasattr(diffusers, "Krea2Transformer2DModel") else {}


def _krea2() -> Real:
    def build() -> nn.Module:  # the defaults are those of Krea 2
        return diffusers.Krea2Transformer2DModel()

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 100, 12, 2560),
            "timestep": meta(2),
            "position_ids": meta(100 + 64 * 48, 3),
            "encoder_attention_mask": meta(2, 100, dtype=torch.bool),
        }

    return Real(
        "krea2",
        build,
        inputs,
        (128, 96),
        12_820_073_036,
        text=100,
        unit_time=True,
        names=_names,
        flat=".mod.lin",
        comfyui=("comfy.ldm.krea2.model", "SingleStreamDiT"),
        call=lambda model, latent, t: model(latent, t, meta(2, 100, 12 * 2560)),
    )


def _names(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Original names, as diffusers converts them."""
    names = {key: original_name(key) for key in state}
    checkpoint = {name: meta(6) for name in names.values()}
    converted = single_file.convert_krea2_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert list(converted) == list(names)
    return names
