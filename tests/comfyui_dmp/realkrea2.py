"""ComfyUI's Krea 2 in small, and its twin.

Import this only through the `real` fixture of `conftest.py`: it needs ComfyUI on `sys.path`.
"""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import diffusers
import torch
from torch import Tensor

from tests.comfyui_dmp.family import TEXT, Family, packed, unpacked
from tests.tinykrea2 import LAYERS, base_of, model_of, original_name, position_ids

HIDDEN, TEXT_WIDTHS = 256, (16, 128)  # ComfyUI computes the feed-forwards' channels from the width


def known() -> list[Family]:
    """The family, or nothing where diffusers or ComfyUI do not know it."""
    known = hasattr(comfy.supported_models, "Krea2")
    return [_krea2()] if known and hasattr(diffusers, "Krea2Transformer2DModel") else []


def _krea2() -> Family:
    unet = {
        "image_model": "krea2",
        "features": 64,
        "channels": 16,
        "patch": 2,
        "layers": 2,
        "heads": 2,
        "kvheads": 1,
        "txtlayers": LAYERS,
        "txtdim": TEXT_WIDTHS[0],
        "txtheads": 2,
        "txtkvheads": 2,
    }

    def twin() -> torch.nn.Module:
        return model_of(32, HIDDEN, 64, TEXT_WIDTHS)

    def keys() -> dict[str, Any]:
        names = {key: original_name(key) for key in twin().state_dict()}
        flat = [key for key, name in names.items() if name.endswith(".mod.lin")]
        return names | {key: (names[key], None, Tensor.flatten) for key in flat}

    def call(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": packed(x),
            "encoder_hidden_states": text.unflatten(-1, (LAYERS, -1)),
            "timestep": t / 1000,
            "position_ids": position_ids(TEXT, x.shape[-2] // 2, x.shape[-1] // 2),
        }

    return Family(
        "krea2",
        base_of("comfy-krea2", 64, HIDDEN, TEXT_WIDTHS),
        "Krea2",
        unet,
        twin,
        keys,
        call,
        channels=16,
        context=LAYERS * TEXT_WIDTHS[0],
        unpack=lambda out, size: unpacked(out, 1, *size[-2:]),
        frames=(1,),
    )
