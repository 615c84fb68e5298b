"""The Stable Diffusion UNets (1.x, 2.x, XL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dmp_common.bases.base import Argument, Base, Prediction, Probe, Site, TimeSource
from dmp_common.bases.outputs import output_sets, output_sites
from dmp_common.bases.transformer import depth_probes
from dmp_common.bases.unetlayers import UnetLayers


@dataclass(frozen=True)
class Unet:
    """Describes a Stable Diffusion UNet (1.x, 2.x, XL) in a row of the table.

    Sites are the inputs of the LDM blocks after the first convolution, with the block's own
    stream only: in the decoder the first D channels, before the skip connection's.

    Args:
        name: name of the base.
        widths: channels of the levels, for example (320, 640, 1280, 1280).
        context: width of the text embedding, by which SD 1.5 and 2.1 differ.
        attention: which levels have attention blocks.
        layers: residual blocks of an encoder level.
        pooled: input channels of the embedding of the pooled text and the picture's size, by which
            SDXL and Kolors differ. None is not checked.
        depth: transformer blocks in an attention of the last level and of the middle, by which
            SDXL differs from models that are distilled from it. None is not checked.
        prediction, architecture, hub_id: see `Base`.
        transformers: transformer blocks of an attention, for each level; the middle has as many as
            the last level. None means one everywhere.
        linear: the attention blocks' first and last layers are linear, not convolutions.
    """

    name: str
    widths: Sequence[int]
    context: int
    attention: Sequence[bool]
    layers: int = 2
    pooled: int | None = None
    depth: int | None = None
    prediction: Prediction = "epsilon"
    architecture: str = ""
    hub_id: str | None = None
    transformers: Sequence[int] | None = None
    linear: bool = False

    def base(self) -> Base:
        """Returns the base of these numbers."""
        widths, layers = self.widths, self.layers
        sites = _encoder(widths, layers) + _middle(widths) + _decoder(widths, layers)
        transformers = self.transformers or [1] * len(widths)
        outputs = UnetLayers(widths, self.attention, layers, transformers, self.linear)
        return Base(
            name=self.name,
            sites=tuple(sites),
            layout="map",
            embedding=4 * widths[0],
            sinusoid=widths[0],
            times={
                "diffusers": TimeSource(
                    "time_embedding", Argument("timestep", 1), "time_embedding", "time_proj"
                ),
                "ldm": TimeSource("time_embed", Argument("timesteps", 1), "time_embed"),
            },
            probes={"diffusers": self._diffusers_probes(), "ldm": self._ldm_probes()},
            site_sets={
                "encoder": tuple(s.name for s in sites if not s.name.startswith("out.")),
                "decoder": tuple(s.name for s in sites if s.name.startswith("out.")),
                "blocks": tuple(s.name for s in sites if _is_first(s)),
            },
            default_sites="encoder",
            prediction=self.prediction,
            architecture=self.architecture,
            hub_id=self.hub_id,
            outputs=partial(output_sites, outputs),
            output_sets=partial(output_sets, outputs),
        )

    @property
    def _attends(self) -> int:
        """Returns the first level that has attention blocks."""
        return list(self.attention).index(True)

    def _diffusers_probes(self) -> tuple[Probe, ...]:
        attention = f"down_blocks.{self._attends}.attentions.0"
        return (
            Probe("conv_in", "out_channels", self.widths[0]),
            Probe("time_embedding.linear_1", "out_features", 4 * self.widths[0]),
            Probe(f"down_blocks.{len(self.widths)}", None, False),
            Probe(f"{attention}.{_TO_K}", "in_features", self.context),
            *self._companion_probe("add_embedding.linear_1"),
            *self._depth_probes(
                f"down_blocks.{len(self.widths) - 1}.attentions.0", "mid_block.attentions.0"
            ),
        )

    def _ldm_probes(self) -> tuple[Probe, ...]:
        blocks = self.layers + 1  # each level has residual blocks and a downsampler
        attention = f"input_blocks.{self._attends * blocks + 1}.1"
        return (
            Probe("input_blocks.0.0", "out_channels", self.widths[0]),
            Probe("time_embed.0", "out_features", 4 * self.widths[0]),
            Probe(f"input_blocks.{len(self.widths) * blocks}", None, False),
            Probe(f"{attention}.{_TO_K}", "in_features", self.context),
            *self._companion_probe("label_emb.0.0"),
            *self._depth_probes(
                f"input_blocks.{(len(self.widths) - 1) * blocks + 1}.1", "middle_block.1"
            ),
        )

    def _companion_probe(self, path: str) -> tuple[Probe, ...]:
        return () if self.pooled is None else (Probe(path, "in_features", self.pooled),)

    def _depth_probes(self, *attentions: str) -> tuple[Probe, ...]:
        if self.depth is None:
            return ()
        paths = [f"{attention}.transformer_blocks" for attention in attentions]
        return tuple(probe for path in paths for probe in depth_probes(path, self.depth))


_TO_K = "transformer_blocks.0.attn2.to_k"


def unet(name: str, **facts: Any) -> Base:
    """Returns the base of a row `Unet(name, ...)`, for models that are not in the table."""
    return Unet(name, **facts).base()


def _is_first(site: Site) -> bool:
    """Tells whether a site is the first of a diffusers block."""
    return site.paths["diffusers"].endswith("resnets.0")


def _unet_site(name: str, width: int, stride: int, diffusers: str, ldm: str) -> Site:
    return Site(
        name,
        width,
        stride,
        paths={"diffusers": diffusers, "ldm": ldm},
        arguments={
            # AnimateDiff's UNet passes it by keyword; its frames are items of the batch.
            "diffusers": Argument(
                "hidden_states" if "downsamplers" in diffusers else "input_tensor", 0
            ),
            "ldm": Argument("x", 0),
        },
    )


def _encoder(widths: Sequence[int], layers: int) -> list[Site]:
    sites: list[Site] = []
    previous = widths[0]
    for level, width in enumerate(widths):
        names = [f"resnets.{n}" for n in range(layers)]
        if level < len(widths) - 1:
            names.append("downsamplers.0")
        for n, module in enumerate(names):
            block = level * (layers + 1) + n + 1
            channels = previous if n == 0 else width
            sites.append(
                _unet_site(
                    f"in.{block}",
                    channels,
                    2**level,
                    f"down_blocks.{level}.{module}",
                    f"input_blocks.{block}.0",
                )
            )
        previous = width
    return sites


def _middle(widths: Sequence[int]) -> list[Site]:
    stride = 2 ** (len(widths) - 1)
    return [_unet_site("mid", widths[-1], stride, "mid_block.resnets.0", "middle_block.0")]


def _decoder(widths: Sequence[int], layers: int) -> list[Site]:
    sites: list[Site] = []
    stream = widths[-1]
    for up, width in enumerate(reversed(widths)):
        stride = 2 ** (len(widths) - 1 - up)
        for n in range(layers + 1):
            block = up * (layers + 1) + n
            sites.append(
                _unet_site(
                    f"out.{block}",
                    stream,
                    stride,
                    f"up_blocks.{up}.resnets.{n}",
                    f"output_blocks.{block}.0",
                )
            )
            stream = width
    return sites
