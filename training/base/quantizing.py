"""Models in fewer bits, made from the exact one (--student_quantization)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn as nn

from dmp_common import PatchError
from dmp_common.tools.gguf_header import require_gguf
from training.base import memory
from training.base.frozen import FrozenBase
from training.base.layers import copy_sharing, linear_layers, replace_layer
from training.base.rounding import GROUP, round_groups, round_rows
from training.base.stored import Fp8Linear, GgufLinear

_ROUNDED = re.compile(rf"rtn(\d)(-group{GROUP})?")
_FP8 = torch.float8_e4m3fn


@torch.no_grad()
def quantized(frozen: FrozenBase, quantization: str, trained: bool) -> nn.Module:
    """Returns the model of a base with the linear layers of its blocks in fewer bits.

    Args:
        frozen: the base, on the device that trains; it stays as it is.
        quantization: as --student_quantization names it.
        trained: whether the method trains the weights, which must then be the model's own.

    Raises:
        PatchError: a package is missing.
    """
    if trained or quantization == "fp8":  # whose weights move between two precisions in place
        model = copy.deepcopy(frozen.model)
    else:
        model = copy_sharing(frozen.model)
    rounded = _ROUNDED.fullmatch(quantization)
    if rounded is not None:
        _round(model, int(rounded[1]), in_groups=rounded[2] is not None)
    elif quantization == "fp8":
        memory.use_fp8(model, frozen.base.times[frozen.naming].mlp, frozen.dtype)
    elif quantization in ("int8", "int4"):
        _use_torchao(model, 8 if quantization == "int8" else 4)
    else:
        _replace(model, _MAKERS.get(quantization) or _gguf_maker(quantization))
    return model


def _round(model: nn.Module, bits: int, in_groups: bool) -> None:
    for layer in linear_layers(model).values():
        weight = (round_groups if in_groups else round_rows)(layer.weight, bits)
        layer.weight = nn.Parameter(weight, requires_grad=False)


Maker = Callable[[nn.Linear], nn.Module]


def _replace(model: nn.Module, make: Maker) -> None:
    """Puts a layer that `make` makes in the place of each linear layer."""
    for path, layer in linear_layers(model).items():
        replace_layer(model, path, make(layer))


def _gguf_maker(quantization: str) -> Maker:
    """Makes layers in a type of GGUF, as files of this type have them."""
    gguf = require_gguf()
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kind = gguf.GGMLQuantizationType[quantization.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]

    def make(layer: nn.Linear) -> nn.Module:
        if layer.in_features % block:
            return layer  # no file could have it in this type
        stored = gguf.quants.quantize(layer.weight.float().cpu().numpy(), kind)
        parameter = GGUFParameter(torch.from_numpy(stored), quant_type=kind)
        return GgufLinear(layer, parameter.to(layer.weight.device), layer.bias)

    return make


def _in_scaled_fp8(layer: nn.Linear) -> nn.Module:
    """One scale for the whole weight, with which its largest value is the largest of fp8."""
    largest = layer.weight.float().abs().max()
    scale = torch.where(largest > 0, largest / torch.finfo(_FP8).max, 1.0)
    weight = nn.Parameter((layer.weight.float() / scale).to(_FP8), requires_grad=False)
    return Fp8Linear(layer, weight, layer.bias, scale)


def _in_nf4(layer: nn.Linear) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise PatchError(
            "expected the package bitsandbytes for --student_quantization nf4, found none: "
            "pip install bitsandbytes, or use q4_0, which needs the package gguf."
        ) from error
    weight = layer.weight
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None,
        compute_dtype=weight.dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    # It is quantised on its way to the device.
    values = weight.detach().cpu().clone()
    made.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    made.weight = made.weight.to(weight.device)
    made.bias = layer.bias
    # On some CPUs a call without gradients would repack the weight for bfloat16, and then no call
    # has a gradient any more.
    made.support_avx512bf16_for_cpu = False
    return made


_MAKERS: dict[str, Maker] = {"fp8-scaled": _in_scaled_fp8, "nf4": _in_nf4}


def _use_torchao(model: nn.Module, bits: Literal[4, 8]) -> None:
    """Integers with a scale for each row (8 bits), or for each group of 32 values (4 bits)."""
    layers = linear_layers(model)
    if bits == 4:
        layers = {path: layer for path, layer in layers.items() if layer.in_features % GROUP == 0}
    option = f"--student_quantization int{bits}"
    memory.quantize_linear(model, set(layers), bits, option, f"rtn{bits}")
