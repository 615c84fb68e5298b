"""Says in which types of numbers the weights of a model are, whichever library stores them.

A patch that repairs a model in fewer bits records them, and a host compares them with those of the
model that it has. Values are counted, because a count does not depend on which layers a naming
fuses.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn as nn

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "INT8",
    **{
        getattr(torch, name): short
        for name, short in (("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"))
        if hasattr(torch, name)  # since torch 2.1
    },
}
# Attributes of parameters that keep bytes: the type, and the shape of the values.
_GGUF = (
    ("quant_type", "quant_shape"),  # diffusers
    ("tensor_type", "tensor_shape"),  # ComfyUI-GGUF
    ("gguf_cls", "real_shape"),  # Forge
    ("gguf_cls", "gguf_real_shape"),  # older Forge
)


def weight_types(model: nn.Module) -> dict[str, int]:
    """Returns for each type of numbers how many values of a model's parameters have it.

    Types have the names of safetensors and GGUF: F32, BF16, F8_E4M3, Q4_0; and INT8, INT4, NF4.

    Args:
        model: a denoiser of diffusers or of a host.
    """
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        kind, count = _type_of(parameter)
        counts[kind] += count
    return dict(counts)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a precision as safetensors has it, such as F32 or BF16."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch.").upper())


def _type_of(parameter: Any) -> tuple[str, int]:
    """Returns the type of a parameter's values and their number."""
    # diffusers, ComfyUI-GGUF and Forge keep bytes, with a type of the package gguf and the true
    # shape.
    for kind, shape in _GGUF:
        found = getattr(parameter, kind, None)
        name = getattr(found, "name", None) or getattr(found, "__name__", None)
        if isinstance(name, str) and hasattr(parameter, shape):
            return name, math.prod(getattr(parameter, shape))
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes
    if state is not None:
        return str(state.quant_type).upper(), math.prod(state.shape)
    stored = getattr(parameter, "storage_dtype", None)  # of ComfyUI, which shows another `dtype`
    if stored is None:  # of torchao, and ComfyUI before it had a storage type
        kept = getattr(parameter, "qdata", getattr(parameter, "_qdata", None))
        stored = getattr(parameter, "target_dtype", None) or getattr(kept, "dtype", None)
    return dtype_name(stored or parameter.dtype), parameter.numel()
