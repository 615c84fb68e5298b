"""Chroma: FLUX.1 whose modulation comes from one network for all blocks, and from time alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.flux import stream_depths, stream_sites, tokens_latent
from dmp_common.bases.layers import flux_layers
from dmp_common.bases.outputs import Layer, output_sets, output_sites
from dmp_common.bases.timenet import Read, TimeNet
from dmp_common.bases.transformer import latent_with_references

_NETWORK = "distilled_guidance_layer"


def packed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Chroma."""
    return tokens_latent(base, call, Argument("img_ids", 3))


def padded_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's Chroma, which pads to whole tokens."""
    return latent_with_references(base, call, None, denoiser)


def approximated(read: Read, features: Tensor, depth: int) -> Tensor:
    """Returns what the network makes of its features (T, F), by its tensors.

    Args:
        read: see `TimeNet`.
        depth: of its layers with a residual connection.
    """

    def linear(x: Tensor, *names: str) -> Tensor:
        weight = read(*(f"{name}.weight" for name in names))
        return F.linear(x, weight, read(*(f"{name}.bias" for name in names)))

    x = linear(features, "in_proj")
    for n in range(depth):
        scale = read(f"norms.{n}.weight", f"norms.{n}.scale")
        mean = x.square().mean(-1, keepdim=True)
        normed = x * torch.rsqrt(mean + torch.finfo(x.dtype).eps) * scale
        inner = linear(normed, f"layers.{n}.linear_1", f"layers.{n}.in_layer")
        x = x + linear(F.silu(inner), f"layers.{n}.linear_2", f"layers.{n}.out_layer")
    return linear(x, "out_proj")


def _layers(double: int, single: int, width: int) -> list[Layer]:
    """Returns the layers of FLUX.1 without those of the modulation, which Chroma does not have."""
    every = flux_layers(double, single, width)
    return [layer for layer in every if layer.kind != "modulation"]


@dataclass(frozen=True)
class Chroma:
    """Describes Chroma in a row of the table.

    Chroma has no time embedding. One network, `distilled_guidance_layer`, makes every vector that
    scales, shifts or gates a stream, from three sinusoids: of the timestep, of the guidance, which
    is 0, and of the vector's index. The gate sees the first of these vectors (index 0), the shift
    of the first single block. It is a function of the timestep alone, as wide as the time embedding
    of FLUX.1, learned with the model, and there in both namings; its index and guidance add
    constants only. The sinusoid itself would be as pure, but no module of the original code gives
    it, and its 16 channels are not learned. Where a host gives another guidance than 0, ComfyUI's
    gate still sees that of 0.

    Args:
        layers: layers of the network.
    """

    name: str
    double: int
    single: int
    width: int
    hub_id: str | None = None
    layers: int = 5

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(_layers, self.double, self.single, self.width)
        network = partial(TimeSource, mlp=_NETWORK, scale=1000.0, row=0)
        depths = stream_depths(self.double, self.single)
        probes = (Probe(f"{_NETWORK}.out_proj", "out_features", self.width),)
        return Base(
            name=self.name,
            sites=stream_sites(self.double, self.single, self.width, stride=2),
            layout="tokens",
            embedding=self.width,
            sinusoid=16,
            time_constants=((0.0, 16), (0.0, 32)),  # the guidance, and the index of the vector
            time_net=TimeNet(("in_proj",), approximated, self.layers),
            times={
                "diffusers": network(
                    _NETWORK, Argument("timestep", 2), projection="time_text_embed.time_proj"
                ),
                "ldm": network(_NETWORK, Argument("timestep", 1)),
            },
            probes={
                "diffusers": (
                    *probes,
                    Probe("x_embedder", "out_features", self.width),
                    *depths["diffusers"],
                ),
                "ldm": (
                    *probes,
                    Probe("img_in", "out_features", self.width),
                    *depths["ldm"],
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": packed_latent, "ldm": padded_latent},
            shared=True,
            architecture="chroma",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def chroma(name: str, **facts: Any) -> Base:
    """Returns the base of a row `Chroma(name, ...)`, for models that are not in the table."""
    return Chroma(name, **facts).base()
