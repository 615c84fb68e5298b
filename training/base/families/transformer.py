"""PixArt, Stable Diffusion 3, FLUX.1. Their text goes through the pipelines' own encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Family, Given, like

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class T5Family(Family):
    """A family whose captions T5 reads, alone or beside others."""

    longest = 512  # tokens that the pipeline reads of a caption, with the mark of its end

    def window(self, config: TrainConfig) -> int:
        """Tokens of a caption that T5 reads, without its mark of the end."""
        return (config.t5_max_token_length or self.longest) - 1


class PixArt(T5Family):
    """PixArt-alpha and Sigma: T5 with its mask; alpha at 1024 also sees the size."""

    longest = 300

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D), "mask" (B, L) and "sizes" (B, 6)."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(model, "use_additional_conditions", False):
            # The original code tells the size of the image and the aspect ratio of its bucket.
            sizes = like(given["sizes"], noisy)
            added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:6]}
        output: Tensor = model(
            noisy,
            encoder_hidden_states=like(given["prompt"], noisy),
            encoder_attention_mask=like(given["mask"], noisy),
            timestep=t,
            added_cond_kwargs=added,
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}."""
        cls: Any = diffusers.PixArtSigmaPipeline
        pipeline = cls(parts["tokenizer"], parts["text_encoder"], None, None, None)
        prompt, mask, _, _ = pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=parts["text_encoder"].device,
            max_sequence_length=self.window(config) + 1,
        )
        return {"prompt": prompt, "mask": mask}


class SD3(T5Family):
    """Stable Diffusion 3 and 3.5: two CLIPs and T5 in one sequence, pooled text of the CLIPs."""

    longest = 256

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "pooled" (B, P)."""
        output: Tensor = model(
            noisy,
            timestep=t,
            encoder_hidden_states=like(given["prompt"], noisy),
            pooled_projections=like(given["pooled"], noisy),
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "pooled": (B, P)}."""
        cls: Any = diffusers.StableDiffusion3Pipeline
        pipeline = cls(transformer=None, scheduler=None, vae=None, **parts)
        prompt, _, pooled, _ = pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=parts["text_encoder"].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.window(config) + 1,
        )
        return {"prompt": prompt, "pooled": pooled}


class Flux(T5Family):
    """FLUX.1: pooled CLIP, T5; the latent is packed 2 x 2."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D), "pooled" (B, P), "guidance" (B,)."""
        batch, _, height, width = noisy.shape
        config: Any = model.config
        prompt = like(given["prompt"], noisy)
        packed = model(
            pack(noisy),
            encoder_hidden_states=prompt,
            pooled_projections=like(given["pooled"], noisy),
            timestep=t / 1000,  # the model multiplies by 1000
            img_ids=like(image_ids(height, width), noisy),
            txt_ids=prompt.new_zeros(prompt.shape[1], 3),
            guidance=given["guidance"].expand(batch) if config.guidance_embeds else None,
        ).sample
        return unpack(packed, height, width)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "pooled": (B, P)}."""
        cls: Any = diffusers.FluxPipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        prompt, pooled, _ = pipeline.encode_prompt(
            captions,
            captions,  # older diffusers have no default
            device=parts["text_encoder"].device,
            max_sequence_length=self.window(config) + 1,
        )
        return {"prompt": prompt, "pooled": pooled}


def image_ids(height: int, width: int) -> Tensor:
    """Where each token of a latent lies that is packed 2 x 2 (H/2 * W/2, 3): 0, row, column."""
    grid = torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2))
    return torch.cat([torch.zeros(len(grid), 1), grid], dim=1)


def pack(latent: Tensor) -> Tensor:
    """(B, C, H, W) to tokens of 2 x 2 (B, H/2 * W/2, 4C), as Flux takes them."""
    return nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back to (B, C, H, W)."""
    channels = tokens.transpose(1, 2)
    grid = channels.reshape(*channels.shape[:2], height // 2, width // 2)
    return nn.functional.pixel_shuffle(grid, 2)
