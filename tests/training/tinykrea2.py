"""The text encoder of the tiny Krea 2."""

from __future__ import annotations

import torch.nn as nn
import transformers

from tests.tinykrea2 import WIDTH

TAPPED = 36  # layers, of which the pipeline reads every third


def qwen3_vl(words: int) -> nn.Module:
    """A tiny Qwen3-VL that knows so many words."""
    return transformers.Qwen3VLModel(config(words, TAPPED))


def config(words: int, layers: int) -> transformers.Qwen3VLConfig:
    """The configuration of a tiny Qwen3-VL."""
    size = {"intermediate_size": 16, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    text = {
        **size,
        "hidden_size": WIDTH,
        "vocab_size": words,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_parameters": rope,
        "rope_scaling": rope,
    }
    vision = {
        "hidden_size": 8,
        "out_hidden_size": WIDTH,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
