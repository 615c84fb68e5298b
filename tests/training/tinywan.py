"""Tiny parts around Wan: its VAE, schedule and text encoder, for the trainer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn
import transformers

from dmp_common import Base, register_base
from dmp_common.bases.wan import Wan
from training.base.families import table
from training.base.families.family import Family
from training.base.families.table import register_family


def video_vae(cls: Any, *, temporal: bool = False, **more: Any) -> nn.Module:
    """A VAE of a class like Wan's, of factor 2 with four channels.

    Args:
        temporal: it makes one frame of two.
    """
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return cls(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[temporal],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.0, 2.0],
            **more,
        )


def small(family: Family) -> Family:
    """A family of Wan's with the VAE of tiny Wan, which makes one frame of two."""
    return replace(family, multiple=4, frame_stride=2)


def scheduler() -> diffusers.SchedulerMixin:
    """As Wan's repositories have it."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def text_encoder(words: int) -> nn.Module:
    """UMT5 of a number of words."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=words, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2
        )
    )


@dataclass(frozen=True)
class PictureBase:
    """A base of picture to video on disk.

    Args:
        base: describes it.
        folder: of its pipeline.
    """

    base: Base
    folder: Path


def picture_base(folder: Path, plain: Path, clip: bool) -> PictureBase:
    """Makes a pipeline of picture to video from one of text to video.

    Args:
        folder: of the new one.
        plain: of tiny Wan, whose VAE makes one frame of two.
        clip: the model also reads what CLIP sees in the picture, as in Wan 2.1.
    """
    name = "tiny-wan-clip" if clip else "tiny-wan-picture"
    # Beside the noise a mask of two channels and the latent of a picture.
    base = register_base(
        Wan(name, 2, 32, 48, channels=10, pictures=clip, switch=None if clip else 900.0).base()
    )
    family = table.WAN_PICTURE_CLIP if clip else table.WAN_PICTURE
    register_family(base, small(family))
    shutil.copytree(plain, folder)
    seen: dict[str, Any] = {"image_dim": 8, "added_kv_proj_dim": 32} if clip else {}
    with torch.random.fork_rng():
        torch.manual_seed(13)
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=10,
            out_channels=4,
            text_dim=12,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
            **seen,
        )
        model.save_pretrained(folder / "transformer")
        if clip:
            vision = transformers.CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
            transformers.CLIPVisionModel(vision).save_pretrained(folder / "image_encoder")
            processor = transformers.CLIPImageProcessor(
                size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
            )
            processor.save_pretrained(folder / "image_processor")
    return PictureBase(base, folder)
