"""HunyuanImage 2.1: a language model reads the caption, and a ByT5 the words to be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given, like
from training.base.families.language import LanguageFamily

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class HunyuanImage(LanguageFamily):
    """HunyuanImage 2.1: Qwen2.5-VL, its last hidden state but two, without those of the template's
    beginning; and ByT5, which reads what a caption has in quotation marks.

    Padding, which the model masks, is left out as far as no caption of a batch needs it. As in the
    pipeline, the timestep has the precision of the model. Guidance is the plain one; the pipeline
    of diffusers usually takes a variant of its own (adaptive projected guidance).
    """

    longest = 1000

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "prompt" (B, L, D), "mask" (B, L), "glyphs" (B, G, E) and
        "glyph_mask" (B, G)."""
        text: dict[str, Tensor] = {}
        for end, prompt, mask in (("", "prompt", "mask"), ("_2", "glyphs", "glyph_mask")):
            used = int(given[mask].sum(dim=1).max())
            text[f"encoder_hidden_states{end}"] = like(given[prompt], noisy)[:, :used]
            text[f"encoder_attention_mask{end}"] = given[mask][:, :used]
        output: Tensor = model(noisy, timestep=t.to(noisy.dtype), **text).sample
        return output

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"prompt": (B, L, D), "mask": (B, L), "glyphs": (B, G, E), "glyph_mask": (B, G)}."""
        cls: Any = diffusers.HunyuanImagePipeline
        pipeline = cls(vae=None, scheduler=None, transformer=None, **parts)
        pipeline.tokenizer_max_length = self.length(config)
        prompt, mask, glyphs, glyph_mask = pipeline.encode_prompt(
            captions, parts["text_encoder"].device, batch_size=len(captions)
        )
        return {"prompt": prompt, "mask": mask, "glyphs": glyphs, "glyph_mask": glyph_mask}


HUNYUAN_IMAGE = HunyuanImage(
    denoiser="transformer",
    model="HunyuanImageTransformer2DModel",
    since="0.36",
    pipeline="HunyuanImagePipeline",
    autoencoder="AutoencoderKLHunyuanImage",
    encoders={"text_encoder": "Qwen2_5_VLModel", "text_encoder_2": "T5EncoderModel"},
    files={"text_encoder": "text_encoder", "text_encoder_2": "t5xxl"},
    resolution=2048,
    guidance=3.5,
    even=True,
)
