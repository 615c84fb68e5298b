"""Tiny models of every family, with the bases that describe them, and inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import bases, register_base
from tests.discovery import modules
from tests.tinymodel import Tiny, noise

__all__ = ["FAMILIES", "Tiny"]


def _unet_inputs(context: int, xl: bool) -> Callable[..., dict[str, Tensor]]:
    def inputs(
        t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        count = len(t)
        result = {
            "sample": noise(seed, dtype, count, 4, *size),
            "timestep": t,
            "encoder_hidden_states": noise(seed + 1, dtype, count, 3, context),
        }
        if xl:
            result["added_cond_kwargs"] = {
                "text_embeds": noise(seed + 2, dtype, count, 16),
                "time_ids": torch.ones(count, 6, dtype=dtype),
            }
        return result

    return inputs


def _unet(
    name: str, context: int, widths: tuple[int, ...], attention: tuple[bool, ...], xl: bool = False
) -> Tiny:
    base = register_base(
        bases.unet(
            f"tiny-{name}", widths=widths, context=context, attention=attention, linear=xl, layers=1
        )
    )
    extra = {}
    if xl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "use_linear_projection": True,
        }

    def build() -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=[f"{'CrossAttn' * a}DownBlock2D" for a in attention],
            up_block_types=[f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attention)],
            cross_attention_dim=context,
            norm_num_groups=8,
            attention_head_dim=4,
            **extra,
        )

    return Tiny(name, base, build, _unet_inputs(context, xl))


def _dit() -> Tiny:
    base = register_base(
        bases.dit("tiny-dit", depth=3, width=32, patch_size=2, frequency_shift=1.0, grid=(4, 4))
    )

    def build() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    def inputs(
        t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "timestep": t,
            "class_labels": torch.arange(len(t)) % 10,
        }

    return Tiny("dit", base, build, inputs, square_only=True)


def _pixart() -> Tiny:
    base = register_base(bases.pixart("tiny-pixart", depth=3, width=32, hub_id=None))

    def build() -> nn.Module:
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            sample_size=8,
            patch_size=2,
            caption_channels=12,
            use_additional_conditions=False,
        )

    def inputs(
        t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), 5, 12),
            "timestep": t,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return Tiny("pixart", base, build, inputs)


def _sd3(name: str, dual: bool) -> Tiny:
    base = register_base(
        bases.sd3(f"tiny-{name}", depth=3, width=32, dual=dual, dual_blocks=1, hub_id=None)
    )

    def build() -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=32,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=(0,) if dual else (),
        )

    def inputs(
        t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        return {
            "hidden_states": noise(seed, dtype, len(t), 4, *size),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), 5, 12),
            "pooled_projections": noise(seed + 2, dtype, len(t), 10),
            "timestep": t,
        }

    return Tiny(name, base, build, inputs)


def _flux() -> Tiny:
    base = register_base(bases.flux("tiny-flux", double=2, single=2, width=32, hub_id=None))

    def build() -> nn.Module:
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 6, 6),
        )

    def inputs(
        t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> dict[str, Tensor]:
        rows, columns = size[0] // 2, size[1] // 2
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": noise(seed, dtype, len(t), rows * columns, 16),
            "encoder_hidden_states": noise(seed + 1, dtype, len(t), 5, 12),
            "pooled_projections": noise(seed + 2, dtype, len(t), 10),
            "timestep": t / 1000,
            "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], dim=1).to(dtype),
            "txt_ids": torch.zeros(5, 3, dtype=dtype),
        }

    return Tiny("flux", base, build, inputs)


FAMILIES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        _unet("sd15", 12, (16, 32, 32, 32), (True, True, True, False)),
        _unet("sd21", 20, (16, 32, 32, 32), (True, True, True, False)),
        _unet("sdxl", 28, (16, 32, 48), (False, True, True), xl=True),
        _dit(),
        _pixart(),
        _sd3("sd3", dual=False),
        _sd3("sd35", dual=True),
        _flux(),
        *(tiny for module in modules("tests", "tiny") for tiny in module.known()),
    )
}
