"""Tiny models of the families whose captions come from a language model.

Old releases of diffusers do not have them; `known` gives those that this one has.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from dmp_common import bases, register_base
from dmp_common.bases.flux import Flux2
from tests.tinymodel import Tiny, noise

TEXT = 5  # tokens of a caption


def known() -> list[Tiny]:
    """The families this release of diffusers knows."""
    makers = {
        "QwenImageTransformer2DModel": qwen_image,
        "Lumina2Transformer2DModel": lumina2,
        "ZImageTransformer2DModel": z_image,
        "Flux2Transformer2DModel": flux2,
    }
    return [make() for name, make in makers.items() if hasattr(diffusers, name)]


def qwen_image() -> Tiny:
    base = register_base(bases.qwen_image("tiny-qwen-image", depth=2, width=32, hub_id=None))

    def build() -> nn.Module:
        return diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        rows, columns = size[0] // 2, size[1] // 2
        return {
            "hidden_states": noise(seed, dtype, len(t), rows * columns, 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "encoder_hidden_states_mask": torch.ones(len(t), TEXT, dtype=torch.bool),
            "timestep": t / 1000,
            "img_shapes": [[(1, rows, columns)]] * len(t),
        }

    return Tiny("qwen-image", base, build, inputs)


def lumina2() -> Tiny:
    """Captions of two lengths, so that the image tokens of a batch begin at two places."""
    base = register_base(
        bases.lumina2("tiny-lumina2", depth=2, width=32, keys=16, refiners=1, hub_id=None)
    )
    lengths = (TEXT, TEXT - 2)

    def build() -> nn.Module:
        return diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(40, 40, 40),
            cap_feat_dim=12,
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        own = torch.tensor([lengths[item % 2] for item in range(len(t))])
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "timestep": 1 - t / 1000,
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "encoder_attention_mask": torch.arange(TEXT) < own[:, None],
        }

    return Tiny("lumina2", base, build, inputs, text=lengths)


def z_image() -> Tiny:
    """Sequences filled up to multiples of 32, from 16 image tokens and 5 or 3 of the captions."""
    base = register_base(bases.z_image("tiny-z-image", depth=2, width=48, refiners=1, hub_id=None))

    def build() -> nn.Module:
        return diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=48,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=12,
            axes_dims=[8, 8, 8],
            axes_lens=[80, 40, 40],
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        captions = noise(seed + 1, dtype, len(t), TEXT, 12)
        return {
            "x": list(noise(seed, dtype, len(t), 4, 1, *size).unbind()),
            "t": 1 - t / 1000,
            "cap_feats": [text[: TEXT - 2 * (n % 2)] for n, text in enumerate(captions)],
        }

    return Tiny("z-image", base, build, inputs, text=(0,))


def flux2() -> Tiny:
    """A token for each cell of the latent."""
    base = register_base(Flux2("tiny-flux2", double=2, single=2, width=32).base())

    def build() -> nn.Module:
        return diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 4, 4, 4),
        )

    def inputs(
        t: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        grid = torch.cartesian_prod(*(torch.arange(side) for side in (1, *size, 1)))
        text = torch.cartesian_prod(*(torch.arange(side) for side in (1, 1, 1, TEXT)))
        return {
            "hidden_states": noise(seed, dtype, len(t), len(grid), 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), TEXT, 12),
            "timestep": t / 1000,
            "img_ids": grid,
            "txt_ids": text,
            "guidance": torch.full((len(t),), 4.0),
        }

    return Tiny("flux2", base, build, inputs)
