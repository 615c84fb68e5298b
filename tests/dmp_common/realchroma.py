"""Chroma1-HD, where diffusers has it."""

from __future__ import annotations

import diffusers
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

from tests.dmp_common.realmodel import Asked, Real, meta
from tests.tinychroma import original_name


def known() -> dict[str, Real]:
    """The model, or nothing."""
    return {"chroma": _chroma()} if hasattr(diffusers, "ChromaTransformer2DModel") else {}


def _chroma() -> Real:
    def build() -> nn.Module:  # the defaults are those of Chroma1-HD
        return diffusers.ChromaTransformer2DModel()

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 512, 4096),
            "timestep": meta(2),
            "img_ids": meta(64 * 48, 3),
            "txt_ids": meta(512, 3),
            "attention_mask": meta(2, 512 + 64 * 48),
        }

    return Real(
        "chroma",
        build,
        inputs,
        (128, 96),
        8_899_983_424,
        text=512,
        unit_time=True,
        names=_names,
        comfyui=("comfy.ldm.chroma.model", "Chroma"),
        call=lambda model, latent, t: model(latent, t, meta(2, 512, 4096), meta(2)),
    )


def _names(state: dict[str, Tensor]) -> dict[str, str]:
    """Original names, as diffusers converts them."""
    known: dict[str, None] = {f"double_blocks.{n}.x": None for n in range(19)}
    known |= {f"single_blocks.{n}.x": None for n in range(38)}
    known |= {f"distilled_guidance_layer.layers.{n}.x": None for n in range(5)}
    checkpoint = Asked(known, lambda key: 3072 * 7 if ".linear1." in key else 6)
    convert = single_file.convert_chroma_transformer_checkpoint_to_diffusers
    names = checkpoint.origins(convert(checkpoint))
    assert names == {key: original_name(key) for key in state}
    return names
