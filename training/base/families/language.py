"""Families whose captions come from a language model: Lumina 2, Z-Image,
Qwen-Image.

Their text goes through the pipelines' own encoders, with the templates that these have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.base.families.family import Family, Given, like
from training.base.families.transformer import pack, unpack

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class LanguageFamily(Family):
    """A family whose one text encoder is a language model, which reads captions in a template."""

    longest = 512  # tokens that the pipeline reads of a template and a caption
    template = 0  # about how many of them are the template's

    def length(self, config: TrainConfig) -> int:
        """Tokens of template and caption together; the rest is cut off."""
        return config.llm_max_token_length or self.longest

    def window(self, config: TrainConfig) -> int:
        """About how many tokens of a caption are read, beside the template."""
        return max(self.length(config) - self.template, 1)


class Lumina2(LanguageFamily):
    """Lumina-Image 2.0: Gemma 2, its last hidden state but one, after a system prompt.

    The model's time runs from noise to picture, and its output from picture to noise.
    """

    longest = 256
    template = 30

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        output: Tensor = model(
            noisy,
            timestep=1 - t / 1000,
            encoder_hidden_states=like(given["prompt"], noisy),
            encoder_attention_mask=given["mask"],
        ).sample
        return -output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}.

        The empty caption is what the pipeline guides away from, which has no system prompt.
        """
        cls: Any = diffusers.Lumina2Pipeline
        pipeline = cls(transformer=None, scheduler=None, vae=None, **parts)
        prompt, mask, nothing, no_mask = pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=not all(captions),
            device=parts["text_encoder"].device,
            system_prompt=config.system_prompt,
            max_sequence_length=self.length(config),
        )
        if nothing is not None:
            empty = torch.tensor([not caption for caption in captions], device=mask.device)
            prompt = torch.where(empty[:, None, None], nothing, prompt)
            mask = torch.where(empty[:, None], no_mask, mask)
        return {"prompt": prompt, "mask": mask}


class ZImage(LanguageFamily):
    """Z-Image: Qwen3, its last hidden state but one, after its chat template.

    The model takes lists: pictures of one frame, and captions without padding. Its time runs from
    noise to picture, and its output from picture to noise.
    """

    template = 11

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        prompt = like(given["prompt"], noisy)
        captions = [text[own] for text, own in zip(prompt, given["mask"].bool(), strict=True)]
        output: list[Tensor] = model(
            list(noisy.unsqueeze(2).unbind()), 1 - t / 1000, captions, return_dict=False
        )[0]
        return -torch.stack(output).squeeze(2)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}."""
        cls: Any = diffusers.ZImagePipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        texts, _ = pipeline.encode_prompt(
            list(captions),  # which it writes over
            device=parts["text_encoder"].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length(config),
        )
        return padded(texts, self.length(config))


class QwenImage(LanguageFamily):
    """Qwen-Image, and Qwen-Image-Edit as a model of text: the language half of Qwen2.5-VL, its last
    hidden state without those of the template's beginning; the latent is packed 2 x 2."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        batch, _, height, width = noisy.shape
        mask = given["mask"].bool()
        longest = int(mask.sum(dim=1).max())
        packed: Tensor = model(
            pack(noisy),
            encoder_hidden_states=like(given["prompt"], noisy)[:, :longest],
            encoder_hidden_states_mask=mask[:, :longest],
            timestep=t / 1000,  # the model multiplies by 1000
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample
        return unpack(packed, height, width)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}."""
        cls: Any = diffusers.QwenImagePipeline
        pipeline = cls(scheduler=None, vae=None, transformer=None, **parts)
        prompt, mask = pipeline.encode_prompt(
            captions,
            device=parts["text_encoder"].device,
            max_sequence_length=self.length(config),
        )
        if mask is None:  # no caption is shorter than another
            mask = prompt.new_ones(prompt.shape[:2])
        texts = [text[own] for text, own in zip(prompt, mask.bool(), strict=True)]
        return padded(texts, self.length(config))


def padded(texts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """{"prompt": (B, length, D), "mask": (B, length)} of texts (L, D) of B captions."""
    longest = texts[0].new_zeros(length, texts[0].shape[1])  # so that all batches fit together
    prompt = pad_sequence([*texts, longest], batch_first=True)[:-1]
    sizes = torch.tensor([len(text) for text in texts], device=prompt.device)
    return {"prompt": prompt, "mask": torch.arange(length, device=prompt.device) < sizes[:, None]}
