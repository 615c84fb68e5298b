"""Tiny parts around Wan: its VAE, schedule and text encoder, for the trainer."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn
import transformers


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
