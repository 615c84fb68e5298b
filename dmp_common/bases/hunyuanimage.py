"""HunyuanImage 2.1: the blocks of FLUX.1, a token for each cell, and refined text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.nn as nn

from dmp_common.bases.base import (
    Argument,
    Base,
    Latent,
    ModelCall,
    Probe,
    TimeSource,
    find_module,
    x_latent,
)
from dmp_common.bases.flux import stream_depths, stream_sites
from dmp_common.bases.layers import flux_layers
from dmp_common.bases.outputs import Layer, attention_layers, output_sets, output_sites, under


def host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's HunyuanImage, which had the image first in older releases.

    These say so in an attribute of their double blocks.
    """
    latent = x_latent(base, call, denoiser)
    block = find_module(denoiser, "double_blocks.0")
    return replace(latent, text_tokens=0) if getattr(block, "flipped_img_txt", False) else latent


def hunyuan_layers(double: int, single: int, width: int, refiners: int) -> Iterator[Layer]:
    """Yields the layers of HunyuanImage.

    Args:
        refiners: blocks that see the text alone.
    """
    parts = ("attn.to_q", "attn.to_k", "attn.to_v")
    text = [
        Layer("mod", 2 * width, "norm_out.linear", "adaLN_modulation.1", kind="modulation"),
        *attention_layers(width, parts, "self_attn.qkv"),
        Layer("to_out", width, "attn.to_out.0", "self_attn.proj"),
        Layer("ff.in", 4 * width, "ff.net.0.proj", "mlp.0"),
        Layer("ff.out", width, "ff.net.2", "mlp.2"),
    ]
    here = "context_embedder.token_refiner.refiner_blocks"
    for n in range(refiners):
        yield from under(
            text, f"text.{n}", f"{here}.{n}", f"txt_in.individual_token_refiner.blocks.{n}"
        )
    yield from flux_layers(double, single, width)


@dataclass(frozen=True)
class HunyuanImage:
    """Describes HunyuanImage 2.1 in a row of the table.

    Its VAE makes a cell of 32 x 32 pixels. The naming "ldm" is ComfyUI's; in the original code some
    layers have other names. In diffusers each block takes the image tokens apart from the text;
    in ComfyUI's single blocks they share a sequence. The distilled sibling, whose time embedding
    is that of two timesteps, and the refiner are no models of this base.

    Args:
        channels: of the latent.
        refiners: blocks that see the text alone.
    """

    name: str
    double: int
    single: int
    width: int
    channels: int = 64
    refiners: int = 2
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time = "time_guidance_embed.timestep_embedder"
        layers = partial(hunyuan_layers, self.double, self.single, self.width, self.refiners)
        depths = stream_depths(self.double, self.single)
        return Base(
            name=self.name,
            sites=stream_sites(self.double, self.single, self.width, stride=1),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 1), time, "time_guidance_embed.time_proj"
                ),
                "ldm": TimeSource("time_in", Argument("timestep", 1), "time_in"),
            },
            probes={
                "diffusers": (
                    Probe("x_embedder.proj", "out_channels", self.width),
                    Probe("x_embedder.proj", "in_channels", self.channels),
                    Probe("context_embedder.token_refiner", None, True),
                    *depths["diffusers"],
                ),
                "ldm": (
                    Probe("img_in.proj", "out_channels", self.width),
                    Probe("img_in.proj", "in_channels", self.channels),
                    Probe("txt_in.individual_token_refiner", None, True),
                    *depths["ldm"],
                ),
            },
            prediction="flow",
            guided="calls",
            shared=True,
            latent={"ldm": host_latent},
            architecture="hunyuan-image",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )
