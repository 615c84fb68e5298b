"""Wan, a model of videos: a picture is a video of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.families.family import Family, Given, like
from training.base.families.transformer import t5_window
from training.base.latents import as_video

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class Wan(Family):
    """Wan 2.1 and 2.2, text to video: UMT5, whose padding the model sees as zeros."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D)."""
        output: Tensor = model(
            as_video(noisy),
            timestep=t,
            encoder_hidden_states=like(given["prompt"], noisy),
        ).sample
        return output.reshape(noisy.shape)

    def window(self, config: TrainConfig) -> int:
        """Tokens of a caption that UMT5 reads, without its mark of the end."""
        return t5_window(config, 512)

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D)}, zero after the caption."""
        cls: Any = diffusers.WanPipeline
        pipeline = cls(vae=None, scheduler=None, transformer=None, **parts)
        try:
            prompt, _ = pipeline.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                device=parts["text_encoder"].device,
                max_sequence_length=self.window(config) + 1,
            )
        except NameError as error:  # diffusers 0.35 takes ftfy for granted
            raise PatchError(
                f"expected the package ftfy, with which diffusers {diffusers.__version__} cleans "
                "Wan's captions, found none: pip install ftfy, or a later diffusers."
            ) from error
        return {"prompt": prompt}
