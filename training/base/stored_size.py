"""How many bytes the weights of a model take when they are stored, whatever they are computed in.

Models in few bits are compared at equal bytes. Simulated ones (rtn3 and the like) are counted as if
they were stored, with their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dmp_common.tools.gguf_header import require_gguf
from dmp_common.tools.weighttypes import weight_types
from training.base.layers import linear_layers
from training.base.rounding import GROUP
from training.base.student_files import stored_types
from training.options.config import TrainConfig

_HALF = 16  # bits of a value in half precision, also of a scale or a minimum
# Bits of a value, scales included: torchao's groups of 32 have a scale and a zero point, those of
# bitsandbytes one scale for 64 values.
_BITS = {
    **dict.fromkeys(("F32", "F16", "BF16"), float(_HALF)),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "INT8"), 8.0),
    "INT4": 4 + 2 * _HALF / GROUP,
    "NF4": 4 + _HALF / 64,
}


def stored_size(model: nn.Module, config: TrainConfig) -> int:
    """The bytes of a denoiser's weights, those in floating point in half precision.

    One scale for a whole row or weight in 8 bits, which is less than a thousandth, is left out.

    Args:
        model: of diffusers, in the form that the configuration asks for.
        config: --student_weights or --student_quantization, or neither.

    Raises:
        PatchError: the package gguf is missing, which a type of GGUF needs.
    """
    quantization = config.student_quantization
    if config.student_weights is not None:
        return _size(stored_types(Path(config.student_weights).expanduser()))
    if quantization is None or not quantization.startswith("rtn"):
        return _size(weight_types(model))
    bits, _, grouped = quantization.removeprefix("rtn").partition("-")
    total = _HALF * sum(parameter.numel() for parameter in model.parameters())
    for layer in linear_layers(model).values():
        rows, columns = layer.weight.shape
        scales = 2 * -(-columns // GROUP) if grouped else 1  # with a minimum, or a scale alone
        total += rows * (columns * (int(bits) - _HALF) + scales * _HALF)
    return -(-total // 8)


def _size(types: Mapping[str, int]) -> int:
    bits = sum(count * (_BITS.get(kind) or _of_gguf(kind)) for kind, count in types.items())
    return round(bits / 8)


def _of_gguf(kind: str) -> float:
    gguf = require_gguf()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * float(size) / block
