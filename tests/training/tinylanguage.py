"""Language models in small, as text encoders of bases.

Each takes the size of its vocabulary.
"""

from __future__ import annotations

import torch.nn as nn
import transformers

_SMALL = {
    "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip


def gemma2(vocabulary: int) -> nn.Module:
    """Gemma 2, of Lumina 2."""
    return transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=vocabulary, **_SMALL))


def qwen2_vl(vocabulary: int) -> nn.Module:
    """Qwen2.5-VL, of Qwen-Image."""
    size = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    return transformers.Qwen2_5_VLModel(
        transformers.Qwen2_5_VLConfig(
            text_config={
                **size, "vocab_size": vocabulary, "num_hidden_layers": 3,
                "num_key_value_heads": 1, "rope_parameters": rope, "rope_scaling": rope,
            },
            vision_start_token_id=vocabulary,  # older releases of transformers know it from files
            vision_config={
                "hidden_size": 8, "out_hidden_size": 12, "intermediate_size": 16, "depth": 1,
                "num_heads": 2, "fullatt_block_indexes": [0],
            },
        )
    )  # fmt: skip


def qwen3(vocabulary: int) -> nn.Module:
    """Qwen3, of Z-Image."""
    return transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=vocabulary, **_SMALL))
