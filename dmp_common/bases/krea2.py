"""Krea 2: text and image tokens in one sequence, and one modulation layer for all blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.flux import tokens_latent
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.timenet import Read, TimeNet
from dmp_common.bases.transformer import block_sites, depth_probes, latent_with_references

_REFERENCES = Argument("ref_latents", 4)
# A block's linear layers: name, path in diffusers and path in the original code.
_BLOCK = (
    ("to_q", "attn.to_q", "attn.wq"),
    ("to_k", "attn.to_k", "attn.wk"),
    ("to_v", "attn.to_v", "attn.wv"),
    ("to_gate", "attn.to_gate", "attn.gate"),
    ("to_out", "attn.to_out.0", "attn.wo"),
    ("ff.in", "ff.up", "mlp.up"),
    ("ff.gate", "ff.gate", "mlp.gate"),
    ("ff.out", "ff.down", "mlp.down"),
)


def packed_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Krea 2; its caption has the position ids 0, 0, 0."""
    return tokens_latent(base, call, Argument("position_ids", 3))


def padded_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of ComfyUI's Krea 2, which pads to whole tokens.

    It takes reference pictures only where a method for them is chosen.
    """
    method = call.kwargs.get("ref_latents_method", getattr(denoiser, "default_ref_method", None))
    references = None if method is None else _REFERENCES
    return latent_with_references(base, call, references, denoiser)


def time_layers(read: Read, features: Tensor, depth: int) -> Tensor:
    """Returns the time embedding (T, E) of its sinusoid (T, F): two layers with GELU between."""
    first, second = ("linear_1", "0"), ("linear_2", "2")

    def linear(x: Tensor, names: tuple[str, str]) -> Tensor:
        weight, bias = (read(*(f"{n}.{part}" for n in names)) for part in ("weight", "bias"))
        return F.linear(x, weight, bias)

    return linear(F.gelu(linear(features, first), approximate="tanh"), second)


def krea2_layers(
    depth: int, widths: dict[str, int], text_widths: dict[str, int], refiners: int
) -> Iterator[Layer]:
    """Yields the layers of Krea 2.

    The blocks that mix the layers of the text encoder are left out: they see a token an item.

    Args:
        widths, text_widths: of a block's layers, by name; those that are missing have that of
            "to_q".
        refiners: blocks that see the text alone.
    """
    mod = "time_mod_proj"
    yield Layer("mod", 6 * widths["to_q"], mod, "tproj.1", kind="modulation")
    text = [Layer(name, text_widths.get(name, text_widths["to_q"]), d, o) for name, d, o in _BLOCK]
    for n in range(refiners):
        here = f"refiner_blocks.{n}"
        yield from under(text, f"text.{n}", f"text_fusion.{here}", f"txtfusion.{here}")
    block = [Layer(name, widths.get(name, widths["to_q"]), d, o) for name, d, o in _BLOCK]
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", f"blocks.{n}")


@dataclass(frozen=True)
class Krea2:
    """Describes Krea 2 in a row of the table.

    The naming "ldm" is the original code's and ComfyUI's. The gate sees the pure time embedding,
    before the layer that makes the modulation of it. The module of it gives (B, 1, E) and has GELU
    between its two layers; in diffusers it makes the sinusoid itself.

    Args:
        keys: channels of the keys, and of the values.
        hidden: channels of the feed-forward.
        text: channels of the text and of its feed-forward.
        refiners: blocks that see the text alone.
    """

    name: str
    depth: int
    width: int
    hub_id: str | None = None
    keys: int = 1536
    hidden: int = 16384
    text: tuple[int, int] = (2560, 6912)
    refiners: int = 2

    def base(self) -> Base:
        """Returns the base of these numbers."""
        feed = dict.fromkeys(("ff.in", "ff.gate"), self.hidden)
        widths = {"to_q": self.width, "to_k": self.keys, "to_v": self.keys, **feed}
        text = {"to_q": self.text[0], **dict.fromkeys(feed, self.text[1])}
        layers = partial(krea2_layers, self.depth, widths, text, self.refiners)
        return Base(
            name=self.name,
            sites=block_sites(
                "block",
                self.depth,
                self.width,
                2,
                diffusers="transformer_blocks",
                ldm="blocks",
            ),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            time_net=TimeNet(("linear_1", "0"), time_layers),
            times={
                "diffusers": TimeSource(
                    "time_embed",
                    Argument("timestep", 2),
                    "time_embed",
                    scale=1000.0,
                    row=0,
                    own_sinusoid=True,
                ),
                "ldm": TimeSource("tmlp", Argument("timesteps", 1), "tmlp", scale=1000.0, row=0),
            },
            probes={
                "diffusers": (
                    Probe("img_in", "out_features", self.width),
                    Probe("text_fusion.projector", None, True),
                    Probe("time_mod_proj", None, True),
                    *depth_probes("transformer_blocks", self.depth),
                ),
                "ldm": (
                    Probe("first", "out_features", self.width),
                    Probe("txtfusion.projector", None, True),
                    *depth_probes("blocks", self.depth),
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": packed_latent, "ldm": padded_latent},
            shared=True,
            architecture="krea-2",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def krea2(name: str, **facts: Any) -> Base:
    """Returns the base of a row `Krea2(name, ...)`, for models that are not in the table."""
    return Krea2(name, **facts).base()
