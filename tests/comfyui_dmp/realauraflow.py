"""ComfyUI's AuraFlow in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
import diffusers
import torch.nn as nn
from torch import Tensor

from dmp_common import register_base
from dmp_common.bases.auraflow import AuraFlow
from tests.comfyui_dmp.family import Family
from tests.tinyauraflow import model_of

DEPTH = {"n_layers": 4, "n_double_layers": 2}


def known() -> list[Family]:
    """The family, or nothing where this release of diffusers does not know it."""
    return [_auraflow()] if hasattr(diffusers, "AuraFlowTransformer2DModel") else []


class _Smooth(Family):
    """With a time embedding that is smooth, as a trained one is.

    The two codes multiply timestep, frequency and 1000 in different orders, so that their sinusoids
    differ by 6e-5 near the noise.
    """

    def diffusers(self, seed: int = 0) -> nn.Module:
        """See `Family.diffusers`."""
        model = super().diffusers(seed)
        for name, parameter in model.named_parameters():
            if name == "time_step_proj.linear_1.weight":
                parameter.mul_(0.05)
        return model


def _auraflow() -> Family:
    unet = DEPTH | {
        "in_channels": 4,
        "out_channels": 4,
        "dim": 64,
        "global_conddim": 64,
        "n_heads": 2,
        "cond_seq_dim": 16,
        "max_seq": 400,
    }

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {"hidden_states": x, "encoder_hidden_states": text, "timestep": t / 1000}

    return _Smooth(
        "auraflow",
        register_base(AuraFlow("comfy-auraflow", double=2, single=2, width=64).base()),
        "AuraFlow",
        unet,
        lambda: model_of(2, 64, 4, 16),
        lambda: comfy.utils.auraflow_to_diffusers(DEPTH),
        call,
    )
