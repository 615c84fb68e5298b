"""The text encoder of ERNIE-Image in small."""

from __future__ import annotations

import torch.nn as nn
import transformers
from torch import Tensor

from tests.training import tinyflux2
from tests.training.trained import Trained
from training.base.families import table


def trained() -> dict[str, Trained]:
    """The family."""
    return {
        "ernie-image": Trained(
            table.ERNIE_IMAGE,
            {"text_encoder": ministral},
            options={"llm_max_token_length": "16"},
            vae=tinyflux2.vae,
            original=lambda state: state,  # whose names in diffusers are the original ones
            in_file={"text_encoder": "text_encoders.ministral3_3b.transformer."},
            length=False,  # the pipeline reads captions of any length
        )
    }


def ministral(vocabulary: int) -> nn.Module:
    """Ministral 3, with a half that sees pictures, as the repository has it."""
    return transformers.Mistral3Model(
        transformers.Mistral3Config(
            text_config={
                "model_type": "ministral3", "vocab_size": vocabulary, "hidden_size": 12,
                "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 6,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                "patch_size": 14,
            },
        )
    )  # fmt: skip


def text_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Ministral 3 in a file of ComfyUI, without the half that sees pictures."""
    inside = "language_model."
    return {
        key.removeprefix(inside): value for key, value in state.items() if key.startswith(inside)
    }
