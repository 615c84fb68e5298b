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
from dmp_common.bases.flux import Flux2
from tests.comfyui_dmp.family import TEXT, Family, packed, unpacked


def known() -> list[Family]:
    """Those this release of diffusers knows."""
    makers = {
        "QwenImageTransformer2DModel": _qwen_image,
        "Lumina2Transformer2DModel": _lumina2,
        "ZImageTransformer2DModel": _z_image,
        "Flux2Transformer2DModel": _flux2,
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

    base = bases.lumina2("comfy-lumina2", depth=3, width=64, keys=32, hub_id=None)
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


def _flux2() -> Family:
    unet = {
        "image_model": "flux2",
        "in_channels": 128,
        "out_channels": 128,
        "vec_in_dim": None,
        "context_in_dim": 16,
        "hidden_size": 64,
        "mlp_ratio": 3.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [8, 8, 8, 8],
        "theta": 2000,
        "patch_size": 1,
        "qkv_bias": False,
        "guidance_embed": False,
        "txt_ids_dims": [3],
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
    }

    def twin() -> nn.Module:
        return diffusers.Flux2Transformer2DModel(
            in_channels=128,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 8, 8, 8),
            guidance_embeds=False,
        )

    def keys() -> dict[str, Any]:
        table = comfy.utils.flux_to_diffusers(
            {"depth": 2, "depth_single_blocks": 2, "hidden_size": 64}
        )
        for n in range(2):
            # ComfyUI's table is FLUX.1's here; the joined projections have other names.
            for part, place in (("ff", "img_mlp"), ("ff_context", "txt_mlp")):
                for layer, number in (("linear_in", 0), ("linear_out", 2)):
                    key = f"transformer_blocks.{n}.{part}.{layer}.weight"
                    table[key] = f"double_blocks.{n}.{place}.{number}.weight"
            single = f"single_transformer_blocks.{n}.attn."
            table[f"{single}to_qkv_mlp_proj.weight"] = f"single_blocks.{n}.linear1.weight"
            table[f"{single}to_out.weight"] = f"single_blocks.{n}.linear2.weight"
        for part in ("double_stream_modulation_img", "double_stream_modulation_txt"):
            table[f"{part}.linear.weight"] = f"{part}.lin.weight"
        table["single_stream_modulation.linear.weight"] = "single_stream_modulation.lin.weight"
        time = "time_guidance_embed.timestep_embedder"
        table[f"{time}.linear_1.weight"] = "time_in.in_layer.weight"
        table[f"{time}.linear_2.weight"] = "time_in.out_layer.weight"
        return table

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        sides = [torch.arange(side) for side in (1, *x.shape[-2:], 1)]
        return {
            "hidden_states": x.flatten(2).transpose(1, 2),
            "encoder_hidden_states": text,
            "timestep": t / 1000,
            "img_ids": torch.cartesian_prod(*sides),
            "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, text.shape[1]))),
        }

    def unpack(out: Tensor, size: tuple[int, int]) -> Tensor:
        return out.transpose(1, 2).unflatten(2, size[-2:])

    return Family(
        "flux2",
        register_base(Flux2("comfy-flux2", double=2, single=2, width=64).base()),
        "Flux2",
        unet,
        twin,
        keys,
        call,
        channels=128,
        unpack=unpack,
    )
