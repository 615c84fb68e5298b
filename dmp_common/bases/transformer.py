"""Transformers: DiT, PixArt, Stable Diffusion 3, FLUX.1."""

from __future__ import annotations

from dmp_common.bases.base import Argument, Base, Probe, Site, TimeSource

_X = Argument("x", 0)
_HIDDEN = Argument("hidden_states", 0)


def block_sites(
    prefix: str,
    count: int,
    width: int,
    stride: int,
    *,
    diffusers: str,
    ldm: str,
    diffusers_argument: Argument = _HIDDEN,
    ldm_argument: Argument = _X,
) -> tuple[Site, ...]:
    return tuple(
        Site(
            f"{prefix}.{n}",
            width,
            stride,
            paths={"diffusers": f"{diffusers}.{n}", "ldm": f"{ldm}.{n}"},
            arguments={"diffusers": diffusers_argument, "ldm": ldm_argument},
        )
        for n in range(count)
    )


def depth_probes(path: str, count: int) -> tuple[Probe, Probe]:
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
        sites=block_sites(
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
                *depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("x_embedder.proj", "in_channels", in_channels),
                Probe("x_embedder.proj", "kernel_size", (patch_size, patch_size)),
                Probe("y_embedder.embedding_table", None, True),
                *depth_probes("blocks", depth),
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
        sites=block_sites(
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
                *depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("x_embedder.proj", "kernel_size", (patch_size, patch_size)),
                Probe("y_embedder.y_proj", None, True),
                Probe("t_block", None, True),
                *depth_probes("blocks", depth),
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
        sites=block_sites(
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
                *depth_probes("transformer_blocks", depth),
            ),
            "ldm": (
                Probe("x_embedder.proj", "out_channels", width),
                Probe("joint_blocks.0.x_block.attn2", None, dual),
                *depth_probes("joint_blocks", depth),
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
            *block_sites(
                "double",
                double,
                width,
                2,
                diffusers="transformer_blocks",
                ldm="double_blocks",
                ldm_argument=Argument("img", 0),
            ),
            *block_sites(
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
                *depth_probes("transformer_blocks", double),
                *depth_probes("single_transformer_blocks", single),
            ),
            "ldm": (
                Probe("img_in", "out_features", width),
                Probe("time_in", None, True),
                *depth_probes("double_blocks", double),
                *depth_probes("single_blocks", single),
            ),
        },
        prediction="flow",
        positions=Argument("img_ids", 4),
        shared=True,
        architecture="flux-1",
        hub_id=hub_id,
    )
