"""Transformers whose captions come from a language model: Qwen-Image, Lumina 2, Z-Image."""

from __future__ import annotations

from dmp_common.bases.base import Argument, Base, Probe, TimeSource
from dmp_common.bases.transformer import block_sites, depth_probes

# ComfyUI has one class for Lumina 2 and Z-Image. It is given sigma, and inverts it itself.
_NEXT_TIME = TimeSource("t_embedder", Argument("timesteps", 1), "t_embedder.mlp", scale=1000.0)


def _next_probes(depth: int, width: int, embedding: int) -> tuple[Probe, ...]:
    return (
        Probe("x_embedder", "out_features", width),
        Probe("t_embedder.mlp.2", "out_features", embedding),
        Probe("cap_embedder", None, True),
        Probe("clip_text_pooled_proj", None, False),  # NewBie, of another depth and gate
        *depth_probes("layers", depth),
    )


def qwen_image(name: str, *, depth: int, width: int, hub_id: str | None) -> Base:
    """Qwen-Image and Qwen-Image-Edit. The latent is packed 2 x 2; text has a stream of its own.

    ComfyUI names the parts as diffusers does; how positions are embedded tells them apart. The
    layered sibling, which makes several pictures in one sequence, is no model of this base.
    """
    time = "time_text_embed.timestep_embedder"
    probes = (
        Probe("img_in", "out_features", width),
        Probe("txt_norm", None, True),
        Probe(time, None, True),
        Probe("time_text_embed.addition_t_embedding", None, False),
        *depth_probes("transformer_blocks", depth),
    )
    return Base(
        name=name,
        sites=block_sites(
            "block",
            depth,
            width,
            2,
            diffusers="transformer_blocks",
            ldm="transformer_blocks",
            ldm_argument=Argument("hidden_states", 0),
        ),
        layout="tokens",
        embedding=width,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                time, Argument("timestep", 3), time, "time_text_embed.time_proj", scale=1000.0
            ),
            "ldm": TimeSource(time, Argument("timestep", 1), time, scale=1000.0),
        },
        probes={
            "diffusers": (*probes, Probe("pe_embedder", None, False)),
            "ldm": (*probes, Probe("pos_embed", None, False)),
        },
        prediction="flow",
        positions=Argument("img_shapes", 4),
        architecture="qwen-image",
        hub_id=hub_id,
    )


def lumina2(name: str, *, depth: int, width: int, hub_id: str | None) -> Base:
    """Lumina-Image 2.0 (Neta Lumina too); naming "ldm" is the original code's.

    Its time runs from 0 (noise) to 1 (picture), and the sinusoid is of that. Text and image tokens
    share a sequence, text first.
    """
    time, embedding = "time_caption_embed.timestep_embedder", min(width, 1024)
    return Base(
        name=name,
        sites=block_sites("layer", depth, width, 2, diffusers="layers", ldm="layers"),
        layout="tokens",
        embedding=embedding,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                time,
                Argument("timestep", 1),
                time,
                "time_caption_embed.time_proj",
                scale=1000.0,
                inverted=True,
            ),
            "ldm": _NEXT_TIME,
        },
        probes={
            "diffusers": (
                Probe("x_embedder", "out_features", width),
                Probe(time, None, True),
                *depth_probes("layers", depth),
            ),
            "ldm": _next_probes(depth, width, embedding),
        },
        prediction="flow",
        inverted=True,
        sinusoid_scale=0.001,
        shared=True,
        caption_mask=Argument("encoder_attention_mask", 3),
        architecture="lumina-2",
        hub_id=hub_id,
    )


def z_image(name: str, *, depth: int, width: int, hub_id: str | None) -> Base:
    """Z-Image; naming "ldm" is ComfyUI's, diffusers kept the original code's names.

    Its time runs from noise to picture. Text and image tokens share a sequence, each filled up to
    multiples of 32: the image first in diffusers, the text first in ComfyUI.
    """
    embedding = min(width, 256)
    return Base(
        name=name,
        sites=block_sites(
            "layer",
            depth,
            width,
            2,
            diffusers="layers",
            diffusers_argument=Argument("x", 0),
            ldm="layers",
        ),
        layout="tokens",
        embedding=embedding,
        sinusoid=256,
        times={
            "diffusers": TimeSource(
                "t_embedder", Argument("t", 1), "t_embedder.mlp", scale=1000.0, inverted=True
            ),
            "ldm": _NEXT_TIME,
        },
        probes={
            "diffusers": (
                Probe("all_x_embedder.2-1", "out_features", width),
                Probe("siglip_embedder", None, False),  # Omni, which takes references
                *depth_probes("layers", depth),
            ),
            "ldm": _next_probes(depth, width, embedding),
        },
        prediction="flow",
        inverted=True,
        time_hidden=1024,
        shared=True,
        architecture="z-image",
        hub_id=hub_id,
    )
