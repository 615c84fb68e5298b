"""Families with an architecture of their own that we do not support, so that errors name them.

A patch could not act on these by mistake. They stand here for the user, who otherwise would only
read that no base fits. A family that gets a base loses its row.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmp_common.bases.base import Probe


@dataclass(frozen=True)
class Stranger:
    """Describes a family that we do not support.

    Args:
        name: the family's name, as users know it, with an article where it needs one.
        signs: how it is recognised. One sign is enough; all probes of a sign must hold.
        classes: names of classes of the denoiser that are always of this family.
        pipelines: how the names of its pipelines' classes begin, where the denoiser itself cannot
            be told from that of a base.
        others: names of classes of the denoiser that are never of this family, whatever they have.
    """

    name: str
    signs: tuple[tuple[Probe, ...], ...] = ()
    classes: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _having(*paths: str) -> tuple[Probe, ...]:
    """A sign: the model has all of these modules."""
    return tuple(Probe(path, None, True) for path in paths)


def _wan(*more: Probe) -> tuple[tuple[Probe, ...], ...]:
    """Two signs: the blocks of Wan in diffusers or in the original code, and more."""
    return tuple((*_having("patch_embedding", f"blocks.0.{part}"), *more) for part in _FEED)


_FEED = ("ffn.net.0", "ffn.0")
_MORE_THAN_WAN = (
    *map(_having, ("vace_blocks", "control_adapter", "ref_conv", "face_adapter")),
    *map(_having, ("pose_patch_embedding", "patch_embedding_pose", "patch_embedding_mask")),
    *map(_having, ("patch_embedding_global", "casual_audio_encoder", "audio_proj")),
    _having("fps_embedding"),
    *(
        (Probe("patch_embedding", "in_channels", a), Probe("patch_embedding", "out_channels", b))
        for a, b in ((36, 1536), (48, 1536), (48, 5120), (32, 5120), (52, 5120), (100, 3072))
    ),
)

# What these have besides the blocks of HunyuanImage: text that is pooled, pictures, another time.
_HUNYUAN = (
    ("time_text_embed", "cond_type_embed", "time_guidance_embed.timestep_embedder_r"),
    ("vector_in", "vision_in", "cond_type_embedding", "time_r_in"),
)


def _refining(path: str) -> Probe:
    """A fact of a model that takes the picture to refine beside the latent."""
    return Probe(f"{path}.proj", "in_channels", 128)


# Of each family its names in diffusers, and those of the original code, which ComfyUI has too.
OTHER_FAMILIES: tuple[Stranger, ...] = (
    Stranger("HiDream", (_having("caption_projection.0.linear"),)),
    Stranger("HiDream-O1", (_having("t_embedder1.mlp.0", "x_embedder.proj1"),)),
    Stranger("Ideogram 4", (_having("embed_image_indicator"),)),
    Stranger(
        "LTX-Video or LTX-2",
        (
            _having("patchify_proj"),
            _having("audio_proj_in", "time_embed.emb"),
            (*_having("proj_in", "time_embed.emb"), Probe("patch_embed", None, False)),
        ),
    ),
    Stranger(
        "HunyuanVideo, or a distilled or refining HunyuanImage",
        (
            *(_having("context_embedder.token_refiner", part) for part in _HUNYUAN[0]),
            *(_having("txt_in.individual_token_refiner", part) for part in _HUNYUAN[1]),
            (*_having("context_embedder.token_refiner"), _refining("x_embedder")),
            (*_having("txt_in.individual_token_refiner"), _refining("img_in")),
        ),
    ),
    Stranger("Hunyuan-DiT", (_having("mlp_t5"), _having("text_embedder", "time_extra_emb"))),
    # ComfyUI does not know Sana, so there is no base in the naming of its original code.
    Stranger(
        "Sana 1.5, Sprint or Video, or a file of Sana's original code",
        (
            _having("attention_y_norm"),
            _having("caption_norm", "transformer_blocks.0.attn1.norm_q"),
            _having("caption_norm", "time_embed.guidance_embedder"),
        ),
        classes=("SanaVideoTransformer3DModel",),
    ),
    Stranger("OmniGen2", (_having("ref_image_patch_embedder"),)),
    Stranger("Chroma Radiance", (_having("distilled_guidance_layer", "nerf_blocks"),)),
    Stranger(
        "Cosmos",
        (
            (*_having("blocks.0.mlp.layer1", "t_embedder"), Probe("llm_adapter", None, False)),
            _having("blocks.block0.blocks.0.block.attn"),
            # In diffusers the model of Anima is that of Cosmos-Predict2 2B for text to image: of
            # that one the pipeline tells.
            _having("time_embed.t_embedder", "learnable_pos_embed"),
            _having("time_embed.t_embedder", "crossattn_proj"),
            (*_having("time_embed.t_embedder"), Probe("patch_embed.proj", "out_features", 5120)),
            (*_having("time_embed.t_embedder"), Probe("patch_embed.proj", "in_features", 72)),
        ),
        pipelines=("Cosmos",),
        others=("Anima",),  # Forge Neo's, which has no adapter
    ),
    # They have Wan's blocks, and more that a patch would not know of: controls, references, sound.
    Stranger(
        "Wan VACE, Fun, Camera, Animate, S2V or another sibling of Wan",
        tuple(sign for more in _MORE_THAN_WAN for sign in _wan(*more)),
        classes=(
            "AnyFlowFARTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "CausalWanModel",
            "ChronoEditTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimate2Transformer3DModel",
        ),
    ),
)
