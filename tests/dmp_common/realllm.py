"""Released models whose captions come from a language model, where diffusers has them."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn

from tests.dmp_common.realmodel import Real, meta

LATENT = (128, 96)


def known() -> dict[str, Real]:
    """Those this release of diffusers knows."""
    makers = {"qwen-image": ("QwenImageTransformer2DModel", _qwen_image)}
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

    return Real("qwen-image", build, inputs, LATENT, 20_430_401_088)
