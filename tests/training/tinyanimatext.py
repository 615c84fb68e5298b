"""What Anima's captions pass beside a tiny Qwen3."""

from __future__ import annotations

import diffusers
import torch
import torch.nn as nn

from tests.tinyanima import WIDTH

LEAST = 12  # tokens of a caption, with zeros after it


def conditioner(words: int) -> nn.Module:
    """Anima's text conditioner in small, for so many words of T5."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return diffusers.AnimaTextConditioner(
            source_dim=12,
            target_dim=WIDTH,
            model_dim=16,
            num_layers=2,
            num_attention_heads=2,
            target_vocab_size=words,
            min_sequence_length=LEAST,
        )
