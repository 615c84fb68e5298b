"""Builders of bases: one function a model family, from its few numbers to a `Base`."""

from __future__ import annotations

from collections.abc import Sequence

from dmp_common.bases import Base, Prediction, Probe, TimeSource
from dmp_common.sites import Argument, Site

_X = Argument("x", 0)


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


def _block_sites(
    prefix: str,
    count: int,
    width: int,
    stride: int,
    *,
    diffusers: str,
    ldm: str,
    ldm_argument: Argument = _X,
) -> tuple[Site, ...]:
    return tuple(
        Site(
            f"{prefix}.{n}",
            width,
            stride,
            paths={"diffusers": f"{diffusers}.{n}", "ldm": f"{ldm}.{n}"},
            arguments={"diffusers": Argument("hidden_states", 0), "ldm": ldm_argument},
        )
        for n in range(count)
    )


def _depth_probes(path: str, count: int) -> tuple[Probe, Probe]:
    return Probe(f"{path}.{count - 1}", None, True), Probe(f"{path}.{count}", None, False)


def dit(
    name: str,
    *,
    depth: int,
    width: int,
    patch_size: int,
    in_channels: int = 4,
    frequency_shift: float = 0.0,
    grid: tuple[int, int] = (16, 16),
    architecture: str = "",
    hub_id: str | None = None,
) -> Base:
    """A class-conditional DiT (Peebles and Xie 2023); naming "ldm" is the original code's.

    The original time embedding has frequency shift 0; diffusers builds its DiT with 1.
    """
    emb = "transformer_blocks.0.norm1.emb"
    return Base(
        name=name,
        sites=_block_sites(
            "block", depth, width, patch_size, diffusers="transformer_blocks", ldm="blocks"
        ),
        layout="tokens",
        embedding=width,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                emb,
                Argument("timestep", 1),
                f"{emb}.timestep_embedder",
                f"{emb}.time_proj",
                inside=True,
                labels=f"{emb}.class_embedder",
            ),
            "ldm": TimeSource(
                "t_embedder", Argument("t", 1), "t_embedder.mlp", labels="y_embedder"
            ),
        },
        probes={
            "diffusers": (
                Probe("pos_embed.proj", "out_channels", width),
                Probe("pos_embed.proj", "in_channels", in_channels),
                Probe("pos_embed.proj", "kernel_size", (patch_size, patch_size)),
                Probe(f"{emb}.class_embedder", None, True),
                *_depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("x_embedder.proj", "in_channels", in_channels),
                Probe("x_embedder.proj", "kernel_size", (patch_size, patch_size)),
                Probe("y_embedder.embedding_table", None, True),
                *_depth_probes("blocks", depth),
            ),
        },
        frequency_shift=frequency_shift,
        grid=grid,
        labels=Argument("class_labels", 2),
        architecture=architecture or "diffusion-transformer",
        hub_id=hub_id,
    )


def pixart(name: str, *, depth: int, width: int, patch_size: int = 2, hub_id: str | None) -> Base:
    """PixArt-alpha and PixArt-Sigma, whose transformers have the same blocks."""
    return Base(
        name=name,
        sites=_block_sites(
            "block", depth, width, patch_size, diffusers="transformer_blocks", ldm="blocks"
        ),
        layout="tokens",
        embedding=width,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                "adaln_single.emb.timestep_embedder",
                Argument("timestep", 2),
                "adaln_single.emb.timestep_embedder",
                "adaln_single.emb.time_proj",
            ),
            "ldm": TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp"),
        },
        probes={
            "diffusers": (
                Probe("pos_embed.proj", "out_channels", width),
                Probe("pos_embed.proj", "kernel_size", (patch_size, patch_size)),
                Probe("adaln_single.emb.timestep_embedder", None, True),
                Probe("caption_projection", None, True),
                *_depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("x_embedder.proj", "kernel_size", (patch_size, patch_size)),
                Probe("y_embedder.y_proj", None, True),
                Probe("t_block", None, True),
                *_depth_probes("blocks", depth),
            ),
        },
        architecture="pixart",
        hub_id=hub_id,
    )


def sd3(
    name: str, *, depth: int, width: int, dual: bool, patch_size: int = 2, hub_id: str | None
) -> Base:
    """Stable Diffusion 3 and 3.5; `dual` tells 3.5 medium, whose first blocks attend twice."""
    return Base(
        name=name,
        sites=_block_sites(
            "joint",
            depth,
            width,
            patch_size,
            diffusers="transformer_blocks",
            ldm="joint_blocks",
            ldm_argument=Argument("x", 1),
        ),
        layout="tokens",
        embedding=width,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                "time_text_embed.timestep_embedder",
                Argument("timestep", 3),
                "time_text_embed.timestep_embedder",
                "time_text_embed.time_proj",
            ),
            "ldm": TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp"),
        },
        probes={
            "diffusers": (
                Probe("pos_embed.proj", "out_channels", width),
                Probe("time_text_embed.timestep_embedder", None, True),
                Probe("transformer_blocks.0.attn2", None, dual),
                *_depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("joint_blocks.0.x_block.attn2", None, dual),
                *_depth_probes("joint_blocks", depth),
            ),
        },
        prediction="flow",
        architecture="stable-diffusion-3",
        hub_id=hub_id,
    )


def flux(name: str, *, double: int, single: int, width: int, hub_id: str | None) -> Base:
    """FLUX.1 (dev, schnell). The latent is packed 2 x 2; single blocks may carry text first."""
    return Base(
        name=name,
        sites=(
            *_block_sites(
                "double",
                double,
                width,
                2,
                diffusers="transformer_blocks",
                ldm="double_blocks",
                ldm_argument=Argument("img", 0),
            ),
            *_block_sites(
                "single",
                single,
                width,
                2,
                diffusers="single_transformer_blocks",
                ldm="single_blocks",
            ),
        ),
        layout="tokens",
        embedding=width,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                "time_text_embed.timestep_embedder",
                Argument("timestep", 3),
                "time_text_embed.timestep_embedder",
                "time_text_embed.time_proj",
                scale=1000.0,
            ),
            "ldm": TimeSource("time_in", Argument("timestep", 1), "time_in", scale=1000.0),
        },
        probes={
            "diffusers": (
                Probe("x_embedder", "out_features", width),
                Probe("time_text_embed.timestep_embedder", None, True),
                *_depth_probes("transformer_blocks", double),
                *_depth_probes("single_transformer_blocks", single),
            ),
            "ldm": (
                Probe("img_in", "out_features", width),
                Probe("time_in", None, True),
                *_depth_probes("double_blocks", double),
                *_depth_probes("single_blocks", single),
            ),
        },
        prediction="flow",
        positions=Argument("img_ids", 4),
        architecture="flux-1",
        hub_id=hub_id,
    )
