"""The CLIP score: how well images fit their captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmp_common import PatchError


class ClipScore:
    """CLIP from a path or hub id.

    Args:
        place: of a CLIP of transformers, such as openai/clip-vit-large-patch14.
        device: where it works.

    Raises:
        PatchError: there is no CLIP at that place.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(place).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            self.images = CLIPImageProcessor.from_pretrained(place)
        except (OSError, ValueError, ImportError) as error:
            raise PatchError(
                f"expected a CLIP model with tokenizer and image processor at {place}, found "
                f"{' '.join(str(error).split())[:160]}: check --clip."
            ) from error
        self.device = device

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """100 max(0, cosine) of images (B, 3, H, W) in [-1, 1] and B captions: (B,), float64.

        Source: Hessel et al. 2021, in the scale of torchmetrics.
        """
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pixels = self.images(list(levels.expand(-1, 3, -1, -1).numpy()), return_tensors="pt")
        text = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = self.model(
                pixel_values=pixels["pixel_values"].to(self.device),
                input_ids=text["input_ids"].to(self.device),
                attention_mask=text["attention_mask"].to(self.device),
            )
        # transformers normalises both.
        cosine = (output.image_embeds * output.text_embeds).sum(-1)
        return 100 * cosine.double().clamp(min=0).cpu()
