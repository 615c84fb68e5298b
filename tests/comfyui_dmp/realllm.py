"""ComfyUI's models whose captions come from a language model, in small, and their twins.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import bases, register_base
from tests.comfyui_dmp.family import TEXT, Family, packed, unpacked


def known() -> list[Family]:
    """Those this release of diffusers knows."""
    makers = {
        "QwenImageTransformer2DModel": _qwen_image,
        "Lumina2Transformer2DModel": _lumina2,
        "ZImageTransformer2DModel": _z_image,
    }
    return [make() for kind, make in makers.items() if hasattr(diffusers, kind)]


def _qwen_image() -> Family:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 12, 12),
    }

    def twin() -> nn.Module:
        return diffusers.QwenImageTransformer2DModel(in_channels=64, out_channels=16, **sizes)

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(len(x), TEXT, dtype=torch.bool),
            "timestep": t / 1000,
            "img_shapes": [[(1, rows, columns)]] * len(x),
        }

    def unpack(out: Tensor, size: tuple[int, int]) -> Tensor:
        return unpacked(out, 1, *size[-2:])

    base = bases.qwen_image("comfy-qwen-image", depth=2, width=64, hub_id=None)
    return Family(
        "qwen-image",
        register_base(base),
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, **sizes},
        twin,
        lambda: {name: name for name in twin().state_dict()},
        call,
        channels=16,
        unpack=unpack,
        frames=(1,),
    )


# What ComfyUI's detection says of models of this class, at real size.
_NEXT = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}


def _lumina2() -> Family:
    unet = _NEXT | {
        "dim": 64,
        "cap_feat_dim": 16,
        "n_layers": 3,
        "n_heads": 2,
        "n_kv_heads": 1,
        "axes_dims": [8, 12, 12],
        "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0,
        "ffn_dim_multiplier": 4.0,
    }

    def twin() -> nn.Module:
        return diffusers.Lumina2Transformer2DModel(
            in_channels=16,
            hidden_size=64,
            num_layers=3,
            num_attention_heads=2,
            num_kv_heads=1,
            axes_dim_rope=(8, 12, 12),
            cap_feat_dim=16,
        )

    def keys() -> dict[str, Any]:
        own = twin().state_dict()
        return {name: _lumina2_key(name, own) for name in own}

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "timestep": 1 - t / 1000,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(len(x), TEXT, dtype=torch.bool),
        }

    base = bases.lumina2("comfy-lumina2", depth=3, width=64, hub_id=None)
    return Family(
        "lumina2",
        register_base(base),
        "Lumina2",
        unet,
        twin,
        keys,
        call,
        channels=16,
        size=(16, 12),
        unpack=lambda out, size: -out,
        conds={"num_tokens": TEXT},
    )


def _lumina2_key(name: str, own: dict[str, Tensor]) -> Any:
    """ComfyUI's name of one of diffusers' weights; joined projections with their place in it."""
    for part, other in {
        "time_caption_embed.caption_embedder": "cap_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
        ".norm1.norm.": ".attention_norm1.",
        ".norm1.linear.": ".adaLN_modulation.1.",
        ".norm1.": ".attention_norm1.",
        ".norm2.": ".attention_norm2.",
        "feed_forward.linear_": "feed_forward.w",
        ".attn.": ".attention.",
        "to_out.0": "out",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }.items():
        name = name.replace(part, other)
    for place, part in enumerate(("to_q", "to_k", "to_v")):
        if part in name:
            return name.replace(part, "qkv"), (0, place, 0)
    return name


def _z_image() -> Family:
    """Its time embedding has 1024 hidden channels in diffusers, in ComfyUI the model's up to 1024.

    The tiny twin has ComfyUI's.
    """
    unet = _NEXT | {
        "dim": 288,
        "cap_feat_dim": 16,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 6,
        "axes_dims": [16, 16, 16],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }

    def twin() -> nn.Module:
        model = diffusers.ZImageTransformer2DModel(
            dim=288,
            n_layers=3,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=16,
            axes_dims=[16, 16, 16],
            axes_lens=[1536, 512, 512],
        )
        model.t_embedder = type(model.t_embedder)(256, mid_size=288)
        return model

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        latents = list(x.unsqueeze(2).unbind())
        return {"x": latents, "t": 1 - t / 1000, "cap_feats": list(text.unbind())}

    base = bases.z_image("comfy-z-image", depth=3, width=288, hub_id=None)
    return Family(
        "z-image",
        register_base(base),
        "ZImage",
        unet,
        twin,
        lambda: comfy.utils.z_image_to_diffusers({"n_layers": 3, "dim": 288}),
        call,
        channels=16,
        size=(16, 12),  # 48 tokens, filled up to 64
        unpack=lambda out, size: -out.squeeze(2),
        conds={"num_tokens": TEXT},
    )
