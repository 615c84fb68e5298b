"""The Stable Diffusion UNets (1.x, 2.x, XL)."""

from __future__ import annotations

from collections.abc import Sequence

from dmp_common.bases.base import Argument, Base, Prediction, Probe, Site, TimeSource


def unet(
    name: str,
    *,
    widths: Sequence[int],
    context: int,
    attention: Sequence[bool],
    layers: int = 2,
    prediction: Prediction = "epsilon",
    architecture: str = "",
    hub_id: str | None = None,
) -> Base:
    """A Stable Diffusion UNet (1.x, 2.x, XL).

    Sites are the inputs of the LDM blocks after the first convolution, with the block's own
    stream only: in the decoder the first D channels, before the skip connection's.

    Args:
        widths: channels of the levels, for example (320, 640, 1280, 1280).
        context: width of the text embedding, which tells SD 1.5 from 2.1.
        attention: which levels have attention blocks.
        layers: residual blocks of an encoder level.
    """
    sites = _unet_encoder(widths, layers) + _unet_middle(widths) + _unet_decoder(widths, layers)
    encoder = tuple(s.name for s in sites if not s.name.startswith("out."))
    levels = len(widths)
    firsts = {f"down_blocks.{b}.resnets.0" for b in range(levels)} | {"mid_block.resnets.0"}
    firsts |= {f"up_blocks.{b}.resnets.0" for b in range(levels)}
    embedding = 4 * widths[0]
    first = list(attention).index(True)
    to_k = "transformer_blocks.0.attn2.to_k"
    return Base(
        name=name,
        sites=tuple(sites),
        layout="map",
        embedding=embedding,
        sinusoid=widths[0],
        times={
            "diffusers": TimeSource(
                "time_embedding", Argument("timestep", 1), "time_embedding", "time_proj"
            ),
            "ldm": TimeSource("time_embed", Argument("timesteps", 1), "time_embed"),
        },
        probes={
            "diffusers": (
                Probe("conv_in", "out_channels", widths[0]),
                Probe("time_embedding.linear_1", "out_features", embedding),
                Probe(f"down_blocks.{levels}", None, False),
                Probe(f"down_blocks.{first}.attentions.0.{to_k}", "in_features", context),
            ),
            "ldm": (
                Probe("input_blocks.0.0", "out_channels", widths[0]),
                Probe("time_embed.0", "out_features", embedding),
                Probe(f"input_blocks.{levels * (layers + 1)}", None, False),
                Probe(f"input_blocks.{first * (layers + 1) + 1}.1.{to_k}", "in_features", context),
            ),
        },
        site_sets={
            "encoder": encoder,
            "decoder": tuple(s.name for s in sites if s.name.startswith("out.")),
            "blocks": tuple(s.name for s in sites if s.paths["diffusers"] in firsts),
        },
        default_sites="encoder",
        prediction=prediction,
        architecture=architecture,
        hub_id=hub_id,
    )


def _unet_site(name: str, width: int, stride: int, diffusers: str, ldm: str) -> Site:
    return Site(
        name,
        width,
        stride,
        paths={"diffusers": diffusers, "ldm": ldm},
        arguments={"diffusers": Argument("hidden_states", 0), "ldm": Argument("x", 0)},
    )


def _unet_encoder(widths: Sequence[int], layers: int) -> list[Site]:
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


def _unet_middle(widths: Sequence[int]) -> list[Site]:
    stride = 2 ** (len(widths) - 1)
    return [_unet_site("mid", widths[-1], stride, "mid_block.resnets.0", "middle_block.0")]


def _unet_decoder(widths: Sequence[int], layers: int) -> list[Site]:
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
