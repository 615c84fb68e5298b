"""Chroma: T5 with its mask; the latent is packed 2 x 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.transformer import T5Family, image_ids, pack, unpack

if TYPE_CHECKING:
    from training.options.config import TrainConfig

# The model multiplies its mask with itself for each pair of tokens and adds that to the scores of
# attention: 1 for two tokens that count, -200 for one of them and padding.
_PADDING = -200.0


class Chroma(T5Family):
    """Chroma: every token of the caption and one of padding, in a sequence with the picture.

    This is the mask of the original code and of ComfyUI. diffusers' own pipeline hands the model a
    mask of ones and zeros, which it adds to the scores, so that all padding is seen there
    (https://github.com/huggingface/diffusers/issues/12116).
    """

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        batch, _, height, width = noisy.shape
        places = image_ids(height, width)
        mask = given["mask"].bool()
        longest = int(mask.sum(dim=1).max())
        prompt, mask = like(given["prompt"], noisy)[:, :longest], mask[:, :longest]
        bias = None
        if not mask.all():
            whole = torch.cat([mask, mask.new_ones(batch, len(places))], dim=1)
            bias = like(torch.where(whole, 1.0, _PADDING), noisy)
        packed = model(
            pack(noisy),
            encoder_hidden_states=prompt,
            timestep=t / 1000,  # the model multiplies by 1000
            img_ids=like(places, noisy),
            txt_ids=prompt.new_zeros(longest, 3),
            attention_mask=bias,
        ).sample
        return unpack(packed, height, width)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}."""
        cls: Any = diffusers.ChromaPipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        prompt, _, mask, *_ = pipeline.encode_prompt(
            captions,
            device=parts["text_encoder"].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.window(config) + 1,
        )
        return {"prompt": prompt, "mask": mask}
