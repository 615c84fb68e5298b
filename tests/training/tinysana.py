"""What is around a tiny Sana."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn as nn

from tests.training import tinylanguage
from tests.training.trained import Trained
from training.base.families.sana import SANA


def trained() -> dict[str, Trained]:
    """The family."""
    return {
        "sana": Trained(
            SANA,
            {"text_encoder": tinylanguage.gemma2},
            options={"llm_max_token_length": "16"},
            vae=_vae,
            side=32,
            told=_told,
        )
    }


def _vae() -> nn.Module:
    """Of factor 2 with four channels."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return diffusers.AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.7,
        )


def _told(pipe: Any, scale: float) -> dict[str, Any]:
    """The pipeline would take the sizes that it knows."""
    return {"guidance_scale": scale, "use_resolution_binning": False}
