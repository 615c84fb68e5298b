"""Released models whose captions come from a language model, where diffusers has them."""

from __future__ import annotations

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
    }
    return {name: make() for name, (kind, make) in makers.items() if hasattr(diffusers, kind)}


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

    return Real("qwen-image", build, inputs, LATENT, 20_430_401_088, unit_time=True)


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
