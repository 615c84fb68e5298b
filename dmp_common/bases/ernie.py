"""ERNIE-Image: text and image share one sequence, the image first."""

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
    hidden_states_latent,
    x_latent,
)
from dmp_common.bases.outputs import Layer, output_sets, output_sites
from dmp_common.bases.parts import Form, Naming
from dmp_common.bases.transformer import block_sites, depth_probes

# Blocks of diffusers hold the sequence before the batch, except in their attention.
_FORMS: dict[Naming, Form] = {"diffusers": "sequence first"}


def image_first(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' ERNIE-Image."""
    return replace(hidden_states_latent(base, call, denoiser), text_tokens=0)


def host_image_first(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's ERNIE-Image."""
    return replace(x_latent(base, call, denoiser), text_tokens=0)


def ernie_layers(depth: int, width: int, hidden: int) -> Iterator[Layer]:
    """Yields the layers of ERNIE-Image, which have the same paths in both namings.

    One modulation layer serves all blocks.

    Args:
        hidden: channels of the feed-forward, which has a gate.
    """
    block = [
        *((part, width, f"self_attention.{part}") for part in ("to_q", "to_k", "to_v")),
        ("to_out", width, "self_attention.to_out.0"),
        ("ff.gate", hidden, "mlp.gate_proj"),
        ("ff.in", hidden, "mlp.up_proj"),
        ("ff.out", width, "mlp.linear_fc2"),
    ]
    path = "adaLN_modulation.1"
    yield Layer("mod", 6 * width, path, path, kind="modulation")
    for n in range(depth):
        for name, channels, path in block:
            forms = _FORMS if path.startswith("mlp") else None
            place = f"layers.{n}.{path}"
            yield Layer(f"layer.{n}.{name}", channels, place, place, forms=forms)


@dataclass(frozen=True)
class ErnieImage:
    """Describes ERNIE-Image (and its distilled Turbo) in a row of the table.

    Its latent is the VAE's of FLUX.2, packed 2 x 2 before the model sees it: a token is one cell.
    ComfyUI kept the names of diffusers; the module of the sinusoid tells the two apart.
    """

    name: str
    depth: int
    width: int
    hidden: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        layers = partial(ernie_layers, self.depth, self.width, self.hidden)
        inputs = block_sites(
            "layer",
            self.depth,
            self.width,
            1,
            diffusers="layers",
            diffusers_argument=Argument("x", 0),
            ldm="layers",
        )
        probes = (
            Probe("x_embedder.proj", "out_channels", self.width),
            Probe("layers.0.mlp.linear_fc2", None, True),
            *depth_probes("layers", self.depth),
        )
        return Base(
            name=self.name,
            sites=tuple(replace(site, forms=_FORMS) for site in inputs),
            layout="tokens",
            embedding=self.width,
            sinusoid=self.width,
            sines_first=True,
            times={
                "diffusers": TimeSource(
                    "time_embedding", Argument("timestep", 1), "time_embedding", "time_proj"
                ),
                "ldm": TimeSource("time_embedding", Argument("timesteps", 1), "time_embedding"),
            },
            probes={
                "diffusers": (*probes, Probe("time_proj", "scale", 1)),
                "ldm": probes,
            },
            prediction="flow",
            shared=True,
            latent={"diffusers": image_first, "ldm": host_image_first},
            architecture="ernie-image",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )
