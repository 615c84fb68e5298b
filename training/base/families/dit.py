"""DiT (Peebles and Xie 2023): with classes, without, or with text; and the bundled digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from training.base.families.family import Family, Given, like
from training.base.families.unet import run_windows, token_windows

if TYPE_CHECKING:
    from training.options.config import TrainConfig


class DiT(Family):
    """Class-conditional DiT; with --text_conditional pooled CLIP text in place of the class."""

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """See `Family.predict`; needs "labels" (B,), or "pooled" (B, P) where text takes their
        place."""
        told = like(given["pooled"], noisy) if "pooled" in given else given["labels"]
        output: Tensor = model(noisy, timestep=t, class_labels=told).sample
        return output

    def window(self, config: TrainConfig) -> int:
        """One window of CLIP, whose pooled text is all that is used."""
        return 75

    def encode_text(
        self, parts: Mapping[str, Any], captions: list[str], config: TrainConfig
    ) -> dict[str, Tensor]:
        """{"pooled": (B, P)}: the pooled output of CLIP, before any projection."""
        windows = token_windows(parts["tokenizer"], captions, self.window(config))
        return {"pooled": run_windows(parts["text_encoder"], windows, -1).pooled}


class TextEmbedding(nn.Module):
    """Stands where diffusers' DiT embeds its class: one linear layer from pooled text (B, P).

    Our choice for data sets with captions, such as COCO: the smallest change that leaves every
    other weight of a class-conditional DiT as it is.

    Args:
        text: P, 768 for CLIP-L.
        width: D of the DiT.
    """

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        # The name the class embedding has, so that a gate with condition t+y finds it.
        self.embedding_table = nn.Linear(text, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, P) to (B, D)."""
        embedded: Tensor = self.embedding_table(pooled)
        return embedded


def use_text(model: Any, size: int) -> None:
    """Puts one new `TextEmbedding` in place of the class embeddings of a DiT."""
    width = model.config.num_attention_heads * model.config.attention_head_dim
    embedding = TextEmbedding(size, width)
    nn.init.normal_(embedding.embedding_table.weight, std=0.02)
    nn.init.zeros_(embedding.embedding_table.bias)
    like_ = next(model.parameters())
    embedding.to(like_.device, like_.dtype)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder = embedding


def takes_text(model: Any) -> bool:
    """Whether a DiT has a `TextEmbedding`."""
    embedder = model.transformer_blocks[0].norm1.emb.class_embedder
    return isinstance(embedder, TextEmbedding)


def share_embeddings(model: Any) -> None:
    """Gives all blocks the embedding of the first, as the original DiT has one for all.

    diffusers repeats it in every block. Trained one by one they would drift apart, and what the
    gate sees, that of block 0, would not be what the others see.
    """
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = first


def initialise(model: Any, embedding_std: float = 0.02) -> None:
    """Gives a DiT the random weights that the original begins with, from torch's generator.

    Every block begins as the identity, and the output as zero.

    Args:
        model: whose blocks share the embedding of the first, or will.
        embedding_std: spread of the timestep and class embeddings.

    Source: facebookresearch/DiT, models.py.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    embedding = model.transformer_blocks[0].norm1.emb
    time = embedding.timestep_embedder
    for part in (time.linear_1, time.linear_2, embedding.class_embedder.embedding_table):
        nn.init.normal_(part.weight, std=embedding_std)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    zero = [block.norm1.linear for block in model.transformer_blocks]
    for layer in (*zero, model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)


def set_frequency_shift(model: Any, shift: float) -> None:
    """Sets `downscale_freq_shift` of the time embedding; 0 is the original DiT's."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


def null_label(model: Any) -> int:
    """The class id that means "no class": the last row of the table, also the only one."""
    return int(model.config.num_embeds_ada_norm)
