"""Qwen-Image 2.1: text and image tokens in one causal sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn

from dmp_common.bases.base import Argument, Base, Latent, ModelCall, Probe, TimeSource
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.transformer import block_sites, depth_probes


def target_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' Qwen-Image 2.1, of which each cell is a token.

    `img_shapes` has a list of (frames, rows, columns) for each item, with those of reference
    pictures before the latent's own, whose tokens are the last of the sequence.
    """
    sample, shapes = call.get(Argument("hidden_states", 0)), call.get(Argument("img_shapes", 3))
    _, rows, columns = shapes[0][-1]
    return Latent(len(sample), (rows, columns))


def qwen21_layers(depth: int, width: int) -> Iterator[Layer]:
    """Yields the layers of Qwen-Image 2.1.

    The one modulation layer is left out: its output has a row more than the batch has items, which
    is that of the text.
    """
    paths = {
        "to_q": (width, "attn.to_q"),
        "to_k": (width, "attn.to_k"),
        "to_v": (width, "attn.to_v"),
        "to_out": (width, "attn.to_out.0"),
        "ff.in": (3 * width, "img_mlp.proj"),
        "ff.gate": (3 * width, "img_mlp.gate_layer"),
        "ff.out": (width, "img_mlp.out"),
    }
    block = [Layer(name, channels, path, None) for name, (channels, path) in paths.items()]
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", None)


@dataclass(frozen=True)
class QwenImage21:
    """Describes Qwen-Image 2.1 in a row of the table, in the naming of diffusers.

    Text and reference pictures come before the picture and never see it; they are modulated as at
    timestep 0, so that their keys and values can be kept from the first step on. The gate sees the
    pure time embedding of the items, without that of timestep 0. A patch that adds acts on the
    picture alone, so what is kept stays right. A modulating patch changes the keys and values of
    the text as well, at each timestep otherwise: with it nothing is kept, as with
    `use_kv_cache=False`.
    """

    name: str
    depth: int
    width: int
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time = "time_text_embed.timestep_embedder"
        layers = partial(qwen21_layers, self.depth, self.width)
        return Base(
            name=self.name,
            sites=block_sites(
                "block", self.depth, self.width, 1, diffusers="transformer_blocks", ldm=None
            ),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={"diffusers": TimeSource(time, Argument("timestep", 2), time, scale=1000.0)},
            probes={
                "diffusers": (
                    Probe("img_in", "out_features", self.width),
                    Probe("txt_in.text_norm", None, True),
                    Probe("modulation.1", "out_features", 4 * self.width),
                    Probe(time, None, True),
                    *depth_probes("transformer_blocks", self.depth),
                ),
            },
            prediction="flow",
            guided="calls",
            latent={"diffusers": target_latent},
            shared=True,
            time_bias=False,
            kept=(Argument("kv_cache", 8), Argument("kv_cache_mode", 9)),
            architecture="qwen-image-2.1",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )


def qwen_image21(name: str, **facts: Any) -> Base:
    """Returns the base of a row `QwenImage21(name, ...)`, for models that are not in the table."""
    return QwenImage21(name, **facts).base()
