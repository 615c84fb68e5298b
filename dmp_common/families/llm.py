"""Transformers whose captions come from a language model: Qwen-Image, Lumina 2, Z-Image."""

from __future__ import annotations

from dmp_common.bases import Base, Probe, TimeSource
from dmp_common.families.transformer import block_sites, depth_probes
from dmp_common.sites import Argument


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
