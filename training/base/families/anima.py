"""Anima: Qwen3, and a conditioner that tells its text to the tokens of T5's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily, padded

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class Anima(LanguageFamily):
    """Anima: the transformer of Cosmos-Predict2, whose text comes from Qwen3 and a conditioner.

    The conditioner has a vector for each token of T5, which looks at the states of Qwen3; T5's
    tokenizer alone is needed of T5. A caption shorter than 512 tokens is followed by zeros, which
    the transformer sees as text.

    For the empty caption Qwen3 says nothing, as in diffusers; ComfyUI gives it one token there.
    """

    template = 1  # T5's mark of the end

    def require_packages(self) -> None:
        """See `Family.require_packages`."""
        from diffusers.models.transformers import transformer_cosmos

        if not hasattr(transformer_cosmos, "transforms"):
            raise PatchError(
                "expected the package torchvision, with which diffusers resizes a mask of Anima's "
                "transformer, found none: pip install torchvision."
            )

    def reader(self, tokenizer: Any) -> Any:
        """See `Family.reader`; padding comes after a caption, where it changes nothing of it."""
        tokenizer.padding_side = "right"
        return tokenizer

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        longest = int(given["mask"].sum(dim=1).max())
        output: Tensor = model(
            noisy.unsqueeze(2),  # a picture is a video of one frame
            timestep=t / 1000,
            encoder_hidden_states=like(given["prompt"], noisy)[:, :longest],
            padding_mask=noisy.new_zeros(1, 1, *noisy.shape[-2:]),
        ).sample
        return output.squeeze(2)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}; the mask holds for the zeros after a caption too,
        up to the number that the pipeline has of them."""
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        encoder, conditioner = parts["text_encoder"], parts["text_conditioner"]
        step: Any = AnimaTextEncoderStep
        read = step.encode_prompt(
            SimpleNamespace(**parts),
            captions,
            prepare_unconditional_embeds=False,
            max_sequence_length=self.length(config),
            device=encoder.device,
            dtype=encoder.dtype,
        )
        told = conditioner(
            source_hidden_states=read["qwen_prompt_embeds"].to(conditioner.dtype),
            target_input_ids=read["t5_input_ids"],
            target_attention_mask=read["t5_attention_mask"],
            source_attention_mask=read["qwen_attention_mask"],
        )
        least = conditioner.config.min_sequence_length
        lengths = read["t5_attention_mask"].sum(dim=1).clamp(min=least)
        texts = [text[:length] for text, length in zip(told, lengths.tolist(), strict=True)]
        return padded(texts, max(self.length(config), least))

    def pipeline_of(self, parts: Mapping[str, Any]) -> Any:
        """See `Family.pipeline_of`."""
        cls: Any = diffusers.AnimaModularPipeline
        pipeline = cls()
        pipeline.update_components(**parts)
        return pipeline
