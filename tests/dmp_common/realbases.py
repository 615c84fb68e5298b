"""What the tests of the bases share: families, patches, plain restatements."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from unittest import mock

import diffusers
import pytest
import torch
import torch.nn as nn

import dmp_common as dmp
from dmp_common import get_base
from dmp_common.attach.forms import as_tokens
from dmp_common.bases.base import find_module
from tests.discovery import modules
from tests.dmp_common.realmodel import Real, meta

__all__ = ["ALL", "MODELS", "Seen", "count", "meta", "model_of", "seen"]


def _unet(base: str, context: int, parameters: int, **config) -> Real:
    xl = "addition_embed_type" in config

    def build() -> nn.Module:
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=context, **config)

    def inputs() -> dict:
        added = {"text_embeds": meta(2, 1280), "time_ids": meta(2, 6)}
        return {
            "sample": meta(2, 4, 64, 64),
            "timestep": meta(2),
            "encoder_hidden_states": meta(2, 77, context),
        } | ({"added_cond_kwargs": added} if xl else {})

    prediction = "v_prediction" if base == "sd21" else "epsilon"
    return Real(base, build, inputs, (64, 64), parameters, prediction=prediction)


def _dit(size: str, depth: int, heads: int, patch_size: int, head_width: int = 64) -> Real:
    def build() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=4,
            out_channels=8,
            num_layers=depth,
            sample_size=32,
            patch_size=patch_size,
        )

    def inputs() -> dict:
        labels = meta(2, dtype=torch.long)
        return {"hidden_states": meta(2, 4, 32, 32), "timestep": meta(2), "class_labels": labels}

    return Real(f"dit-{size}/{patch_size}", build, inputs, (32, 32), prediction="epsilon")


def _pixart(alpha: bool) -> Real:
    def build() -> nn.Module:  # the defaults are those of PixArt-XL-2
        return diffusers.PixArtTransformer2DModel(
            sample_size=128, caption_channels=4096, use_additional_conditions=alpha
        )

    def inputs() -> dict:
        conditions = {"resolution": meta(2, 2), "aspect_ratio": meta(2, 1)}
        return {
            "hidden_states": meta(2, 4, 128, 96),
            "encoder_hidden_states": meta(2, 120, 4096),
            "timestep": meta(2),
            "added_cond_kwargs": conditions if alpha else dict.fromkeys(conditions),
        }

    return Real("pixart", build, inputs, (128, 96), channels=4, prediction="epsilon")


def _sd3(base: str, depth: int, heads: int, parameters: int, **config) -> Real:
    def build() -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=depth,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=4096,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=96,  # a table; larger ones take old versions half a minute
            **config,
        )

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 16, 128, 96),
            "encoder_hidden_states": meta(2, 154, 4096),
            "pooled_projections": meta(2, 2048),
            "timestep": meta(2),
        }

    dead = ("norm1_context.linear", "attn.add_q_proj")
    return Real(base, build, inputs, (128, 96), parameters, dead=dead)


def _flux(guidance: bool, parameters: int) -> Real:
    def build() -> nn.Module:
        return diffusers.FluxTransformer2DModel(guidance_embeds=guidance)

    def inputs() -> dict:
        return {
            "hidden_states": meta(2, 64 * 48, 64),
            "encoder_hidden_states": meta(2, 512, 4096),
            "pooled_projections": meta(2, 768),
            "timestep": meta(2),
            "img_ids": meta(64 * 48, 3),
            "txt_ids": meta(512, 3),
            "guidance": meta(2) if guidance else None,
        }

    return Real("flux", build, inputs, (128, 96), parameters, text=512, unit_time=True)


MODELS = {
    "sd15": _unet("sd15", 768, 859_520_964, attention_head_dim=8),
    "sd21": _unet(
        "sd21",
        1024,
        865_910_724,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sdxl": _unet(
        "sdxl",
        2048,
        2_567_463_684,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "dit-s/2": _dit("s", 12, 6, 2),
    "dit-b/2": _dit("b", 12, 12, 2),
    "dit-b/8": _dit("b", 12, 12, 8),
    "dit-l/4": _dit("l", 24, 16, 4),
    "dit-xl/2": _dit("xl", 28, 16, 2, head_width=72),
    "pixart-alpha": _pixart(alpha=True),
    "pixart-sigma": _pixart(alpha=False),
    "sd3": _sd3("sd3", 24, 24, 2_028_328_000),
    "sd35-medium": _sd3(
        "sd35-medium",
        24,
        24,
        2_243_171_520,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35-large": _sd3("sd35-large", 38, 38, 8_056_627_520, qk_norm="rms_norm"),
    "flux-dev": _flux(guidance=True, parameters=11_901_408_320),
    "flux-schnell": _flux(guidance=False, parameters=11_891_178_560),
}
for _module in modules("tests.dmp_common", "real"):
    MODELS |= _module.known()
# By model: all tests of one follow each other, so that few processes build it.
ALL = pytest.mark.parametrize("name", MODELS, scope="module")


@functools.cache
def model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[name].build()
    return model.to("meta").eval().requires_grad_(False)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Seen:
    """What a forward call of the real model showed: site inputs in order, outputs, and e."""

    inputs: dict[str, tuple[int, ...]]
    skips: dict[str, int]
    embedding: tuple[int, ...]
    features: tuple[int, ...]
    outputs: dict[str, tuple[int, ...]]


@functools.cache
def seen(name: str) -> Seen:
    """Shapes at every site, from a forward call on the meta device."""
    model, real = model_of(name), MODELS[name]
    base = get_base(real.base)
    inputs: dict[str, tuple[int, ...]] = {}
    times: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = []

    def watch(site: dmp.Site):
        key = site.arguments["diffusers"]

        def hook(module, args, kwargs):
            assert site.name not in inputs, "a site is entered once a call"
            x = args[key.index] if len(args) > key.index else kwargs[key.name]
            inputs[site.name] = tuple(as_tokens(x, site.forms.get("diffusers")).shape)

        module = find_module(model, site.paths["diffusers"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    outputs: dict[str, tuple[int, ...]] = {}

    def watch_output(site: dmp.Site):
        def hook(module, args, out):
            assert site.name not in outputs, "an output is computed once a call"
            outputs[site.name] = tuple(out.shape)

        return find_module(model, site.paths["diffusers"]).register_forward_hook(hook)

    handles += [watch(site) for site in base.sites]
    handles += [watch_output(site) for site in base.outputs]
    mlp = find_module(model, base.times["diffusers"].mlp)
    layers = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for layer in (layers[0], layers[-1]):
        handles.append(
            layer.register_forward_hook(lambda m, args, out: times.append((args[0], out)))
        )
    without = mock.patch("torch.autocast", return_value=contextlib.nullcontext())  # not on meta
    with torch.no_grad(), without:
        model(**real.inputs(), return_dict=False)
    for handle in handles:
        handle.remove()
    skips = _skips(model) if base.layout == "map" else {}
    (first, _), (_, last) = times[:2]  # DiT embeds its timesteps once more, at the end
    # Qwen-Image 2.1 embeds timestep 0 too, after those of the two items.
    ends = [(min(len(tensor), 2), tensor.shape[-1]) for tensor in (last, first)]
    return Seen(inputs, skips, *ends, outputs)


def _skips(model: nn.Module) -> dict[str, int]:
    """Channels of the skip connection each decoder site is given: last stored, first used."""
    stored = [model.conv_in.out_channels]
    for block in model.down_blocks:
        stored += [resnet.out_channels for resnet in block.resnets]
        stored += [sampler.out_channels for sampler in block.downsamplers or ()]
    names = [f"out.{n}" for n in range(len(stored))]
    return dict(zip(names, reversed(stored), strict=True))
