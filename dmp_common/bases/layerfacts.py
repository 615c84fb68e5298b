"""Facts about a layer, also where a host's quantised layers do not state them."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

# Attributes a probe may ask for, as parts of the shape of the layer's weight.
_PARTS = {
    "in_features": slice(1, 2),
    "out_features": slice(0, 1),
    "in_channels": slice(1, 2),
    "out_channels": slice(0, 1),
    "kernel_size": slice(2, 4),
}


def attribute_of(layer: nn.Module, attribute: str) -> object:
    """Returns an attribute of a layer, or None where it has none.

    Forge's layers for GGUF and nf4 do not state how many features they have; their weights do.
    """
    found = getattr(layer, attribute, None)
    if found is None and attribute in _PARTS:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            return attribute_of_shape(attribute, true_shape(weight))
    return found


def attribute_of_shape(attribute: str, shape: tuple[int, ...]) -> object:
    """Returns an attribute of a linear layer or convolution, read from its weight's shape."""
    part = shape[_PARTS[attribute]]
    return part[0] if len(part) == 1 else part


def true_shape(weight: Any) -> tuple[int, ...]:
    """Returns the shape of a weight's values, also where they are stored in other numbers."""
    state = getattr(weight, "quant_state", None)  # of bitsandbytes, whose bytes are in one column
    return tuple(weight.shape if state is None else state.shape)
