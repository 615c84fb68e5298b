"""Predictions of a ComfyUI model in the scale of its own output.

ComfyUI's model calls return denoised latents. What both models are compared in is what the network
puts out (noise, v or flow), as in the trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_output(model_sampling: Any, denoised: Tensor, x: Tensor, sigmas: Tensor) -> Tensor:
    """Returns what a model put out, of the denoised latent that ComfyUI makes of it.

    The denoised latent is a straight line in the output, whatever the model predicts.

    Args:
        model_sampling: ComfyUI's object of this name.
        denoised, x: the denoised and the noisy latent (B, C, ..., h, w).
        sigmas: the noise levels (B,).
    """
    shaped = sigmas.reshape(-1, *[1] * (x.dim() - 1))
    ones = torch.ones_like(shaped)
    nothing = model_sampling.calculate_denoised(sigmas, torch.zeros_like(x), x)
    slope = model_sampling.calculate_denoised(sigmas, ones, ones)
    slope = slope - model_sampling.calculate_denoised(sigmas, torch.zeros_like(ones), ones)
    return (denoised - nothing) / slope
