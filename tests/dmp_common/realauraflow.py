"""AuraFlow 0.3, where diffusers has it."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file

from tests.dmp_common.realmodel import Real, meta
from tests.tinyauraflow import REGISTERS, original_name

TEXT = 256


def known() -> dict[str, Real]:
    """The model, or nothing."""
    return {"auraflow": _auraflow()} if hasattr(diffusers, "AuraFlowTransformer2DModel") else {}


def _auraflow() -> Real:
    def build() -> nn.Module:  # the other defaults are those of AuraFlow
        return diffusers.AuraFlowTransformer2DModel(pos_embed_max_size=9216)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 4, 128, 96),
            "encoder_hidden_states": meta(2, TEXT, 2048),
            "timestep": meta(2),
        }

    return Real(
        "auraflow",
        build,
        inputs,
        (128, 96),
        6_858_605_568,
        text=TEXT + REGISTERS,
        unit_time=True,
        channels=4,
        names=_names,
        comfyui=("comfy.ldm.aura.mmdit", "MMDiT"),
        call=lambda model, latent, t: model(latent, t, meta(2, TEXT, 2048)),
    )


def _names(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Original names, as diffusers converts them, where this release does."""
    names = {key: original_name(key) for key in state}
    convert = getattr(single_file, "convert_auraflow_transformer_checkpoint_to_diffusers", None)
    if convert is not None:
        checkpoint = {name: torch.tensor([[n], [n]]) for n, name in enumerate(names.values())}
        converted = convert(dict(checkpoint))
        assert set(converted) == set(state)
        swapped = "norm_out.linear.weight"  # scale and shift change places, in a new tensor
        kept = set(state) - {swapped}
        assert all(converted[key] is checkpoint[names[key]] for key in kept)
    return names
