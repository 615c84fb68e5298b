"""What is around a tiny HunyuanImage."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn
import transformers
from torch import Tensor

from tests.tinyhunyuanimage import original_name
from tests.training import tinylanguage
from tests.training.trained import Trained
from training.base.families.hunyuanimage import HUNYUAN_IMAGE


def trained() -> dict[str, Trained]:
    """The family."""
    return {
        "hunyuan-image": Trained(
            HUNYUAN_IMAGE,
            {"text_encoder": tinylanguage.qwen2_vl, "text_encoder_2": _byt5},
            options={"llm_max_token_length": "24"},
            vae=_vae,
            scheduler={"shift": 5.0},
            original=original,
            length=False,
            told=_told,
        )
    }


_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer in ComfyUI's naming: joined projections, and scale and shift of the last layer
    the other way round."""
    found: dict[str, list[Tensor]] = {}
    parts = [f".{part}." for part in _PARTS]
    for key in sorted(state, key=lambda key: next((n for n in range(7) if parts[n] in key), 0)):
        value = state[key]
        if key.startswith("norm_out.linear."):
            value = value.roll(len(value) // 2, 0)
        found.setdefault(original_name(key), []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def _byt5(words: int) -> nn.Module:
    size = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=words, **size))


def _vae() -> nn.Module:
    """Of factor 2 with four channels."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
            scaling_factor=0.7,
        )


def _told(pipe: Any, scale: float) -> dict[str, Any]:
    """The pipeline guides by a part of its own, and has no argument for the length of captions."""
    pipe.tokenizer_max_length = 24
    if scale != 1.0:
        pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
    return {}
