"""Sana: Gemma 2 reads the caption after an instruction; its VAE gives latents without noise."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.families.family import Family, Given, like
from training.base.families.language import LanguageFamily
from training.base.latents import LatentSpace
from training.base.single_files import SingleFile

if TYPE_CHECKING:
    from training.base.places import Source
    from training.options.config import TrainConfig


class Sana(LanguageFamily):
    """Sana: the last hidden state of Gemma 2 after the pipeline's instruction, without that of the
    instruction but for its first token."""

    longest = 300
    template = 2  # the mark of the beginning, and one token of the instruction

    def of_weights(self, source: Source) -> Family:
        """Refuses a file of Sana 1.5, whose norms diffusers would leave out without a word.

        Raises:
            PatchError: the weights are those of such a file.
        """
        path = Path(source.place)
        if path.is_file():
            with SingleFile(path) as file:
                if any(".q_norm." in name for name in file.shapes):
                    raise PatchError(
                        f"expected weights of Sana, found those of Sana 1.5 at {path}, which is "
                        "not supported: choose other weights."
                    )
        return super().of_weights(source)

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D) and "mask" (B, L)."""
        config: Any = model.config
        output: Tensor = model(
            noisy,
            encoder_hidden_states=like(given["prompt"], noisy),
            timestep=t * config.timestep_scale,
            encoder_attention_mask=given["mask"],
        ).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L)}.

        The empty caption is what the pipeline guides away from, which has no instruction.
        """
        cls: Any = diffusers.SanaPipeline
        pipeline = cls(transformer=None, scheduler=None, vae=None, **parts)
        usual = inspect.signature(cls.__call__).parameters["complex_human_instruction"].default
        prompt, mask, nothing, no_mask = pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=not all(captions),
            device=parts["text_encoder"].device,
            max_sequence_length=self.length(config),
            complex_human_instruction=usual,
        )
        if nothing is not None:
            empty = torch.tensor([not caption for caption in captions], device=mask.device)
            prompt = torch.where(empty[:, None, None], nothing, prompt)
            mask = torch.where(empty[:, None], no_mask, mask)
        return {"prompt": prompt, "mask": mask}


class DeepSpace(LatentSpace):
    """The latents of `AutoencoderDC`, which are no distribution."""

    @property
    def factor(self) -> int:
        """See `LatentSpace.factor`."""
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentSpace.encode`."""
        latent: Tensor = self.vae.encode(pixels).latent
        return latent, torch.zeros_like(latent)


SANA = Sana(
    denoiser="transformer",
    model="SanaTransformer2DModel",
    pipeline="SanaPipeline",
    autoencoder="AutoencoderDC",
    encoders={"text_encoder": "Gemma2Model"},
    files={"text_encoder": "text_encoder"},
    guidance=4.5,
)
