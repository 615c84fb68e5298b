"""Anima as it was released, where diffusers has it."""

from __future__ import annotations

import functools

import diffusers
import torch
import torch.nn as nn
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor

from tests.dmp_common.realmodel import Real, meta
from tests.tinyanima import is_known

LATENT = (128, 96)
# From diffusers' names to the original ones; `_names` proves them.
_PARTS = {
    "time_embed.t_embedder": "t_embedder.1",
    "time_embed.norm": "t_embedding_norm",
    "transformer_blocks": "blocks",
    "norm1.linear_": "adaln_modulation_self_attn.",
    "norm2.linear_": "adaln_modulation_cross_attn.",
    "norm3.linear_": "adaln_modulation_mlp.",
    "norm_out.linear_": "final_layer.adaln_modulation.",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
    "patch_embed.proj": "x_embedder.proj.1",
    "proj_out": "final_layer.linear",
}


def known() -> dict[str, Real]:
    """The model, or nothing."""
    return {"anima": _anima()} if is_known() else {}


def _anima() -> Real:
    def build() -> nn.Module:
        return diffusers.CosmosTransformer3DModel(
            num_attention_heads=16, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None
        )

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 16, 1, *LATENT),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, 512, 1024),
            "padding_mask": meta(1, 1, *LATENT),
        }

    return Real(
        "anima",
        build,
        inputs,
        LATENT,
        1_956_405_248,  # and 134,663,680 of the adapter
        unit_time=True,
        names=original_names,
        comfyui=("comfy.ldm.anima.model", "Anima"),
        call=lambda model, latent, t: model(latent.unsqueeze(2), t, meta(2, 512, 1024)),
        added=_adapter,
    )


@functools.cache
def _adapter() -> dict[str, tuple[int, ...]]:
    """The tensors of the adapter, which diffusers keeps apart."""
    with torch.device("meta"):
        state = diffusers.AnimaTextConditioner().state_dict()
    return {f"llm_adapter.{key}": tuple(value.shape) for key, value in state.items()}


def original_names(state: dict[str, Tensor]) -> dict[str, str]:
    """The original names of these parameters, which diffusers converts to theirs."""
    names = {}
    for key in state:
        original = key
        for part, other in _PARTS.items():
            original = original.replace(part, other)
        names[key] = original
    checkpoint = {original: key for key, original in names.items()}
    converted = single_file.convert_cosmos_transformer_checkpoint_to_diffusers(checkpoint)
    assert all(key == other for key, other in converted.items())
    return names
