"""Sana: linear attention, and a feed-forward of convolutions; text by cross-attention alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dmp_common.bases.base import Argument, Base, Probe, TimeSource
from dmp_common.bases.outputs import Layer, output_sets, output_sites, under
from dmp_common.bases.transformer import block_sites, depth_probes


def sana_layers(depth: int, width: int, hidden: int) -> Iterator[Layer]:
    """Yields the layers of Sana, of which one modulation layer serves all blocks.

    Args:
        hidden: channels of the feed-forward, which has a gate.
    """
    block = [
        *(
            Layer(f"{part}.{name}", width, f"{part}.{path}", None)
            for part in ("attn1", "attn2")
            for name, path in (
                *((name, name) for name in ("to_q", "to_k", "to_v")),
                ("to_out", "to_out.0"),
            )
        ),
        *(
            Layer(f"ff.{name}", channels, f"ff.conv_{path}", None, kind="convolution")
            for name, channels, path in (
                ("in", 2 * hidden, "inverted"),
                ("depth", 2 * hidden, "depth"),
                ("out", width, "point"),
            )
        ),
    ]
    yield Layer("mod", 6 * width, "time_embed.linear", None, kind="modulation")
    for n in range(depth):
        yield from under(block, f"block.{n}", f"transformer_blocks.{n}", None)


@dataclass(frozen=True)
class Sana:
    """Describes Sana in a row of the table, in the naming of diffusers.

    Its VAE makes a cell of 32 x 32 pixels, and each cell is a token. Sana 1.5, whose attention is
    normed, Sprint and Video are no models of this base.

    Args:
        hidden: channels of the feed-forward. None means 2.5 times the width.
    """

    name: str
    depth: int
    width: int
    hidden: int | None = None
    hub_id: str | None = None

    def base(self) -> Base:
        """Returns the base of these numbers."""
        time, blocks = "time_embed.emb.timestep_embedder", "transformer_blocks"
        layers = partial(sana_layers, self.depth, self.width, self.hidden or 5 * self.width // 2)
        return Base(
            name=self.name,
            sites=block_sites("block", self.depth, self.width, 1, diffusers=blocks, ldm=None),
            layout="tokens",
            embedding=self.width,
            sinusoid=256,
            times={
                "diffusers": TimeSource(
                    time, Argument("timestep", 2), time, "time_embed.emb.time_proj"
                )
            },
            probes={
                "diffusers": (
                    Probe("patch_embed.proj", "out_channels", self.width),
                    Probe("caption_norm", None, True),
                    Probe(time, None, True),
                    *depth_probes(blocks, self.depth),
                )
            },
            prediction="flow",
            architecture="sana",
            hub_id=self.hub_id,
            outputs=partial(output_sites, layers),
            output_sets=partial(output_sets, layers),
        )
