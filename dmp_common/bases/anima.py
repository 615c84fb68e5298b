"""Anima: the blocks of Cosmos-Predict2, told by a language model through an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.nn as nn

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource, map_latent
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.parts import Form, Naming
from dmp_common.bases.transformer import block_sites, depth_probes, host_references

# The original blocks keep frames, rows and columns apart, except in their attention.
_FORMS: dict[Naming, Form] = {"ldm": "grid"}


def host_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of a host's Anima, whose tokens those of reference pictures follow.

    Forge Neo appends references (B, C, T, H, W) of the latent's own size as frames.
    """
    latent = map_latent(base, call.get(Argument("x", 0)))
    references = host_references(denoiser)
    if not references:
        return latent
    stride = base.sites[0].stride
    rows, columns = (-(-side // stride) for side in latent.size)
    frames = 1 + sum(picture.shape[2] for picture in references)
    return Latent(
        latent.batch,
        (stride * rows, stride * columns),
        image_tokens=frames * rows * columns,
        text_tokens=0,
    )


def anima_layers(depth: int, width: int, bottleneck: int) -> Iterator[Layer]:
    """Yields the layers of Anima, whose modulation layers are pairs with a bottleneck.

    Args:
        bottleneck: channels between the two layers of a modulation.
    """
    block = [
        *_modulation("attn1", width, bottleneck, "norm1", "self_attn"),
        *_attention("attn1", width, "self_attn"),
        *_modulation("attn2", width, bottleneck, "norm2", "cross_attn"),
        *_attention("attn2", width, "cross_attn"),
        *_modulation("ff", width, bottleneck, "norm3", "mlp"),
        Layer("ff.in", 4 * width, "ff.net.0.proj", "mlp.layer1", forms=_FORMS),
        Layer("ff.out", width, "ff.net.2", "mlp.layer2", forms=_FORMS),
    ]
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", f"blocks.{n}")


def _modulation(
    name: str, width: int, bottleneck: int, diffusers: str, ldm: str
) -> Iterator[Layer]:
    for part, channels, number in (("down", bottleneck, 1), ("up", 3 * width, 2)):
        yield Layer(
            f"{name}.mod.{part}",
            channels,
            f"{diffusers}.linear_{number}",
            f"adaln_modulation_{ldm}.{number}",
            kind="modulation",
        )


def _attention(name: str, width: int, ldm: str) -> Iterator[Layer]:
    for part in "qkv":
        yield Layer(f"{name}.to_{part}", width, f"{name}.to_{part}", f"{ldm}.{part}_proj")
    yield Layer(f"{name}.to_out", width, f"{name}.to_out.0", f"{ldm}.output_proj")


@dataclass(frozen=True)
class Anima:
    """Describes Anima in a row of the table.

    The naming "ldm" is the original's and ComfyUI's, whose model contains the adapter; Forge Neo
    keeps it with the text encoder, and its class tells (`otherfamilies`). diffusers keeps it
    apart too, so that there the model is that of Cosmos-Predict2 2B for text to image, from
    which Anima was trained: neither structure nor configuration tells the two from each other. A
    pipeline does, so that one of Cosmos is refused; where the transformer alone is given, nothing
    does. Wider models, and those of videos, are others.

    The gate sees what the time embedding's two layers make of the sinusoid: three vectors side by
    side, which all modulations of the blocks share. Besides them the normalised sinusoid itself
    reaches the blocks.
    """

    name: str
    depth: int
    width: int
    channels: int = 16
    bottleneck: int = 256
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time, layers = "time_embed.t_embedder", "transformer_blocks"
        outputs = partial(anima_layers, self.depth, self.width, self.bottleneck)
        inputs = block_sites("block", self.depth, self.width, 2, diffusers=layers, ldm="blocks")
        features = 4 * (self.channels + 1)  # of 2 x 2 cells, with those of a mask
        return Base(
            name=self.name,
            sites=tuple(replace(site, forms=_FORMS) for site in inputs),
            layout="tokens",
            embedding=3 * self.width,
            sinusoid=self.width,
            sinusoid_scale=0.001,
            time_hidden=self.width,
            time_bias=False,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 1), time, "time_embed.time_proj", scale=1000.0
                ),
                "ldm": TimeSource(
                    "t_embedder.1",
                    Argument("timesteps", 1),
                    "t_embedder.1",
                    scale=1000.0,
                    row=0,  # of frames
                ),
            },
            probes={
                "diffusers": (
                    Probe("patch_embed.proj", "out_features", self.width),
                    Probe("patch_embed.proj", "in_features", features),
                    Probe(time, None, True),
                    Probe("learnable_pos_embed", None, False),  # Cosmos 1
                    Probe("crossattn_proj", None, False),  # Cosmos 2.5
                    *depth_probes(layers, self.depth),
                ),
                "ldm": (
                    Probe("x_embedder.proj.1", "out_features", self.width),
                    Probe("x_embedder.proj.1", "in_features", features),
                    *depth_probes("blocks", self.depth),
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"ldm": host_latent},
            architecture="anima",
            hub_id=self.hub_id,
            outputs=partial(output_sites, outputs),
            output_sets=partial(output_sets, outputs),
        )
