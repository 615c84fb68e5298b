"""Krea 2: Qwen3-VL, several of its layers for each token; the latent is packed 2 x 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily
from training.base.families.transformer import pack, unpack

if TYPE_CHECKING:
    from training.options.config import TrainConfig

_DISTILLED_SHIFT = 1.15  # of diffusers' pipeline


class Krea2(LanguageFamily):
    """Krea 2: the language half of Qwen3-VL, its hidden states after every third layer.

    The chat template ends after the padding, which is masked, and no token of the text has a
    position: padding that is no item's may be left out. The scale of guidance is the usual one,
    which is 1 more than that of the pipeline.
    """

    template = 5

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, layers, D) and "mask" (B, L)."""
        _, _, height, width = noisy.shape
        mask = given["mask"].bool()
        used = mask.any(dim=0)
        axes = (torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
        grid = torch.cartesian_prod(*axes).to(noisy.device)
        text = grid.new_zeros(int(used.sum()), 3)
        packed = model(
            pack(noisy),
            encoder_hidden_states=like(given["prompt"], noisy)[:, used],
            timestep=t / 1000,  # the model multiplies by 1000
            position_ids=torch.cat([text, grid]),
            encoder_attention_mask=mask[:, used],
        ).sample
        return unpack(packed, height, width)

    def shift(self, scheduler: Any, steps: int, tokens: int) -> float:
        """See `Family.shift`; that of distilled weights is the same for every size."""
        return _DISTILLED_SHIFT if self.distilled else super().shift(scheduler, steps, tokens)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, layers, D), "mask": (B, L)}."""
        cls: Any = diffusers.Krea2Pipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        prompt, mask = pipeline.encode_prompt(
            captions,
            device=parts["text_encoder"].device,
            max_sequence_length=self.length(config),
        )
        return {"prompt": prompt, "mask": mask}
