"""The cheap call's model: the same base with weights in fewer bits, beside the exact one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import torch
import torch.nn as nn

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.base.layers import copy_sharing, linear_layers
from training.base.loading import Said
from training.base.rounding import GROUP, round_groups, round_rows
from training.options.config import TrainConfig

_ROUNDED = re.compile(rf"rtn(\d)(-group{GROUP})?")


def cheap_base(frozen: FrozenBase, config: TrainConfig, said: Said | None = None) -> FrozenBase:
    """Returns a base whose model is the cheap form of another's; everything else is shared.

    Args:
        frozen: the exact base, which stays as it is. Weights that do not differ are shared, unless
            the method trains them.
        config: of the run, with --student_quantization.
        said: is called with a line before and after the model is made, `print` for example.

    Raises:
        PatchError: the configuration names no cheap form, or one that cannot be made here.
    """
    if config.student_quantization is None:
        raise PatchError(
            "expected --student_quantization, which says what the cheap model is, found none: give "
            "it, for example --student_quantization rtn3."
        )
    if said is not None:
        said(f"making the cheap model: {config.student_quantization}")
    model = _rounded(frozen.model, config.student_quantization, config.trains_base)
    return dataclasses.replace(frozen, model=model.eval().requires_grad_(False))


def student_facts(cheap: FrozenBase, config: TrainConfig) -> dict[str, Any]:
    """Returns what a patch file records of the cheap model: small, and only for information.

    Args:
        cheap: from `cheap_base`.
        config: the same as there.

    Returns:
        "quantization", and "types": for each type of number how many values of weights have it.
        These counts do not depend on the naming, which may fuse layers.
    """
    assert config.student_quantization is not None
    counts: Counter[str] = Counter()
    layers = set(linear_layers(cheap.model).values())
    for module in cheap.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rounded = module in layers and name == "weight"
            kind = config.student_quantization if rounded else _type_name(parameter.dtype)
            counts[kind] += parameter.numel()
    return {"quantization": config.student_quantization, "types": dict(counts)}


@torch.no_grad()
def _rounded(exact: nn.Module, quantization: str, trained: bool) -> nn.Module:
    """A copy of a model whose linear layers are rounded as `rtn...` says."""
    found = _ROUNDED.fullmatch(quantization)
    assert found is not None
    bits, in_groups = int(found[1]), found[2] is not None
    layers = linear_layers(exact)
    own = {f"{name}.weight" for name in layers}
    if trained:
        own = {name for name, _ in exact.named_parameters()}
    model = copy_sharing(exact, frozenset(own))
    values = dict(exact.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name.removesuffix(".weight") in layers:
            value = (round_groups if in_groups else round_rows)(values[name], bits)
        else:
            value = values[name].clone()
        if parameter.is_meta:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, nn.Parameter(value, requires_grad=False))
    return model


def _type_name(dtype: torch.dtype) -> str:
    """The name of a precision as safetensors and GGUF have it: F32, F16, BF16."""
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(
        dtype, str(dtype).removeprefix("torch.")
    )
