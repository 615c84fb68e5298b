"""AuraFlow: one T5, whose padding the model sees as zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.transformer import T5Family

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class AuraFlow(T5Family):
    """AuraFlow and Pony V7: Pile-T5-XL, which transformers knows as UMT5."""

    longest = 256

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D)."""
        output: Tensor = model(
            noisy,
            encoder_hidden_states=like(given["prompt"], noisy),
            timestep=t / 1000,  # the model multiplies by 1000
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D)}, zero after the caption."""
        cls: Any = diffusers.AuraFlowPipeline
        pipeline = cls(vae=None, scheduler=None, transformer=None, **parts)
        prompt, *_ = pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=parts["text_encoder"].device,
            max_sequence_length=self.window(config) + 1,
        )
        return {"prompt": prompt}


AURAFLOW = AuraFlow(
    denoiser="transformer",
    model="AuraFlowTransformer2DModel",
    pipeline="AuraFlowPipeline",
    encoders={"text_encoder": "UMT5EncoderModel"},
    files={"text_encoder": "t5xxl"},
    guidance=3.5,
)
