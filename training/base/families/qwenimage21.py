"""Qwen-Image 2.1: Qwen3-VL; a token for each cell of the latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily, padded

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class QwenImage21(LanguageFamily):
    """Qwen-Image 2.1 as a model of text: Qwen3-VL's last hidden state before its last norm."""

    template = 8

    def reader(self, tokenizer: Any) -> TextProcessor:
        """See `Family.reader`."""
        return TextProcessor(tokenizer)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        batch, _, height, width = noisy.shape
        mask = given["mask"].bool()
        longest = int(mask.sum(dim=1).max())
        mask = mask[:, :longest]
        pictured = mask.new_ones(batch, height * width // 4)  # a slot is of 2 x 2 tokens
        output: Tensor = model(
            noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=like(given["prompt"], noisy)[:, :longest],
            timestep=t / 1000,  # the model multiplies by 1000
            img_shapes=[[(1, height, width)]] * batch,
            img_mask=torch.cat([torch.zeros_like(mask), pictured], dim=1),
            encoder_hidden_states_mask=None if mask.all() else mask,
        ).sample
        return output[:, longest:].transpose(1, 2).unflatten(2, (height, width))

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}.

        The text encoder is causal, so what is cut off changes nothing of the rest.
        """
        cls: Any = diffusers.QwenImage21Pipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        prompt, mask, _ = pipeline.encode_prompt(captions, device=parts["text_encoder"].device)
        if mask is None:  # no caption is shorter than another
            mask = prompt.new_ones(prompt.shape[:2])
        length = self.length(config)
        texts = [text[own][:length] for text, own in zip(prompt, mask.bool(), strict=True)]
        return padded(texts, length)


class TextProcessor:
    """Reads text for a pipeline that has a processor, which reads pictures as well.

    The processor of Qwen3-VL needs torchvision, which text alone does not.

    Args:
        tokenizer: of transformers, from the folder of the processor.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        """The tokens of B texts."""
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """The tokens of messages, in a batch of one, as a processor gives them."""
        return [self.tokenizer.apply_chat_template(messages, **options)]

    def get_vocab(self) -> dict[str, int]:
        """Tokens by text, by which caches know a tokenizer."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary
