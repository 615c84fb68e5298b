"""ERNIE-Image: the text is what a language model says of the caption as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily, padded

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class ErnieImage(LanguageFamily):
    """ERNIE-Image: Ministral 3, its last hidden state but one, without a template.

    Its prompt enhancer, a second language model that writes longer captions, takes no part. Latents
    are normalised with the number that the VAE's configuration adds to the variances (1e-4 in the
    released one); the pipeline adds 1e-5 whatever it says.
    """

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        lengths = given["mask"].sum(dim=1)
        longest = int(lengths.max())
        output: Tensor = model(
            noisy,
            timestep=t,
            text_bth=like(given["prompt"], noisy)[:, :longest],
            text_lens=lengths.to(noisy.device),
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}.

        A token sees those before it alone, so that the rest of a long caption can be cut off after
        it is read; the pipeline has no limit.
        """
        cls: Any = diffusers.ErnieImagePipeline
        pipeline = cls(transformer=None, scheduler=None, vae=None, **parts)
        texts = pipeline.encode_prompt(captions, parts["text_encoder"].device)
        length = self.length(config)
        return padded([text[:length] for text in texts], length)
