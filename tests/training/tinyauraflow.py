"""What is around a tiny AuraFlow."""

from __future__ import annotations

from torch import Tensor

from tests.tinyauraflow import original_name
from tests.training import tinywan
from tests.training.trained import Trained
from training.base.families.auraflow import AURAFLOW


def trained() -> dict[str, Trained]:
    """The family."""
    return {
        "auraflow": Trained(
            AURAFLOW,
            {"text_encoder": tinywan.text_encoder},
            options={"t5_max_token_length": "6"},
            scheduler={"shift": 1.73},
            original=_original,
            in_file={"text_encoder": "text_encoders.pile_t5xl.transformer."},
        )
    }


def _original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original names; scale and shift of the last layer change places."""
    last = "norm_out.linear.weight"
    swapped = state | {last: state[last].roll(len(state[last]) // 2, 0)}
    return {original_name(key): value for key, value in swapped.items()}
