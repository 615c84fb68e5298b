"""The text encoder and the VAE of the tiny Qwen-Image 2.1."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn
import transformers

from tests.training.tinykrea2 import config


def qwen3_vl_generating(words: int) -> nn.Module:
    """A tiny Qwen3-VL that knows so many words, with the layer that its pipeline does not use."""
    return transformers.Qwen3VLForConditionalGeneration(config(words, layers=3))


def opaque_vae() -> nn.Module:
    """A VAE of factor 2 that sees colours and how opaque they are."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.0, 2.0],
            scale_factor_spatial=2,
        )
