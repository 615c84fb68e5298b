"""Released models whose captions come from a language model, where diffusers has them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta

LATENT = (128, 96)


def known() -> dict[str, Real]:
    """Those this release of diffusers knows."""
    makers = {
        "qwen-image": ("QwenImageTransformer2DModel", _qwen_image),
        "lumina2": ("Lumina2Transformer2DModel", _lumina2),
        "z-image": ("ZImageTransformer2DModel", _z_image),
        "flux2": ("Flux2Transformer2DModel", _flux2_dev),
        "flux2-klein-4b": ("Flux2Transformer2DModel", _flux2_klein_4b),
        "flux2-klein-9b": ("Flux2Transformer2DModel", _flux2_klein_9b),
    }
    return {name: make() for name, (kind, make) in makers.items() if hasattr(diffusers, kind)}


def _flux2(base: str, text: int, parameters: int, **config: Any) -> Real:
    size = (64, 48)  # of the packed latent

    def build() -> nn.Module:
        return diffusers.Flux2Transformer2DModel(joint_attention_dim=text, **config)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 128),
            "encoder_hidden_states": meta(2, 512, text),
            "timestep": meta(2),
            "img_ids": meta(64 * 48, 4),
            "txt_ids": meta(512, 4),
            "guidance": meta(2),
        }

    return Real(base, build, inputs, size, parameters, text=512, unit_time=True, channels=128)


def _flux2_dev() -> Real:
    return _flux2("flux2", 15360, 32_223_281_152)


def _flux2_klein_4b() -> Real:
    return _flux2(
        "flux2-klein-4b",
        7680,
        3_875_544_576,
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        guidance_embeds=False,
    )


def _flux2_klein_9b() -> Real:
    return _flux2(
        "flux2-klein-9b",
        12288,
        9_078_581_248,
        num_single_layers=24,
        num_attention_heads=32,
        guidance_embeds=False,
    )


def _qwen_image() -> Real:
    def build() -> nn.Module:  # the defaults are those of Qwen-Image
        return diffusers.QwenImageTransformer2DModel()

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 100, 3584),
            "encoder_hidden_states_mask": meta(2, 100, dtype=torch.bool),
            "timestep": meta(2),
            "img_shapes": [[(1, 64, 48)]] * 2,
        }

    dead = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    return Real("qwen-image", build, inputs, LATENT, 20_430_401_088, unit_time=True, dead=dead)


class _Mask(torch.Tensor):
    """A mask on the meta device whose sums are known: Lumina 2 needs them as numbers."""

    @staticmethod
    def __new__(cls, *shape: int) -> _Mask:
        return torch.Tensor._make_subclass(cls, meta(*shape, dtype=torch.bool))

    def sum(self, dim: int) -> torch.Tensor:
        return torch.full((self.shape[0],), self.shape[dim])


def _lumina2() -> Real:
    def build() -> nn.Module:  # the other defaults are those of Lumina-Image 2.0
        return diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 16, *LATENT),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, 100, 2304),
            "encoder_attention_mask": _Mask(2, 100),
        }

    return Real("lumina2", build, inputs, LATENT, 2_609_769_152, text=100, unit_time=True)


def _z_image() -> Real:
    def build() -> nn.Module:  # the other defaults are those of Z-Image
        return diffusers.ZImageTransformer2DModel(axes_lens=[1536, 512, 512])

    def inputs() -> dict:
        latents, captions = [meta(16, 1, *LATENT)] * 2, [meta(100, 2560)] * 2
        return {"x": latents, "t": meta(2), "cap_feats": captions}

    return Real("z-image", build, inputs, LATENT, 6_154_908_736, text=128, unit_time=True)
