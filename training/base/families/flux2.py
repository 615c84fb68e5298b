"""FLUX.2: the text is what a language model says in three of its layers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily

if TYPE_CHECKING:
    from training.options.config import TrainConfig


@dataclass(frozen=True)
class Flux2(LanguageFamily):
    """FLUX.2 dev: Mistral Small 3 after a system prompt, with the scale of guidance as a condition.

    Captions are padded and without a mask, as in the pipeline; a token of the picture is one cell
    of the latent.

    Args:
        taps: the numbers of the hidden states that are the text; 0 would be the embedding.
    """

    taps: tuple[int, ...] = (10, 20, 30)
    template = 35

    @property
    def encoder_layers(self) -> int:
        """See `Family.encoder_layers`: nothing above the last tap is read."""
        return self.taps[-1]

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "guidance" (B,)."""
        batch, _, height, width = noisy.shape
        config: Any = model.config
        prompt = like(given["prompt"], noisy)
        tokens: Tensor = model(
            noisy.flatten(2).transpose(1, 2),  # (B, H * W, C)
            encoder_hidden_states=prompt,
            timestep=t / 1000,  # the model multiplies by 1000
            img_ids=_positions(height, width, 1).to(noisy.device),
            txt_ids=_positions(1, 1, prompt.shape[1]).to(noisy.device),
            guidance=given["guidance"].expand(batch) if config.guidance_embeds else None,
        ).sample
        return tokens.transpose(1, 2).reshape(noisy.shape)

    def shift(self, scheduler: Any, steps: int, tokens: int) -> float:
        """Logarithm of the shift, which FLUX.2 makes smaller for more steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import (
            compute_empirical_mu,
        )  # none in old ones

        return compute_empirical_mu(tokens, steps)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D)}, where D is the widths of the tapped layers together."""
        cls: Any = getattr(diffusers, self.pipeline)
        pipeline = cls(transformer=None, scheduler=None, vae=None, **parts)
        prompt, _ = pipeline.encode_prompt(
            captions,
            device=parts["text_encoder"].device,
            max_sequence_length=self.length(config),
            text_encoder_out_layers=self.taps,
        )
        return {"prompt": prompt}


@dataclass(frozen=True)
class Flux2Klein(Flux2):
    """FLUX.2 klein: Qwen3 after its chat template, and no scale of guidance as a condition.

    It is published distilled to four steps (klein) and as it was before (klein-base), in one
    structure. Pipelines say which; of a single file its name tells.
    """

    taps: tuple[int, ...] = (9, 18, 27)
    template = 12


def _positions(rows: int, columns: int, text: int) -> Tensor:
    """Position ids (rows * columns * text, 4): picture, row, column, word."""
    return torch.cartesian_prod(*(torch.arange(count) for count in (1, rows, columns, text)))
