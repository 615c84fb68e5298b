"""Lets gradients pass through calls of ComfyUI's models: weights, attention, rotations, sums."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import comfy.model_management
import torch
import torch.nn as nn
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.functional import rms_norm

ATTENTION = "optimized_attention_override"  # ComfyUI's name for another attention


def usable(value: Any) -> Any:
    """Returns a value of ComfyUI with copies of the tensors that gradients could not pass.

    ComfyUI runs nodes in inference mode, and its tensors cannot be saved for a backward pass.

    Args:
        value: a tensor, or lists, tuples and dictionaries with tensors in them.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: usable(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(usable(inner) for inner in value)
    return value


def attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Takes the place of the attention that the user chose: not every one has a backward pass."""
    out: Tensor = attention_pytorch(*args, **kwargs)
    return out


@contextmanager
def training(changes: bool) -> Iterator[None]:
    """Lets ComfyUI know that gradients are needed: some models then compute in other ways.

    Args:
        changes: whether the model changes tensors in place, as transformers do with the sum that
            runs through their blocks. What the backward pass needs of them is then copied first.
    """
    management = comfy.model_management
    told = hasattr(management, "in_training")  # ComfyUI 0.8 does not ask for it
    before = getattr(management, "in_training", False)
    ways = _kernels() if told else _rotations()
    kept = allow_mutation_on_saved_tensors() if changes else nullcontext()
    if told:
        management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad(), ways, kept:
            yield
    finally:
        if told:
            management.in_training = before


def _rotations() -> AbstractContextManager[None]:
    """Gives the models of ComfyUI 0.8 rotations of positions that have a backward pass."""
    models = [module for name, module in sys.modules.items() if name.startswith("comfy.ldm.")]
    return _instead(models, {"apply_rope": _rotated_both, "apply_rope1": _rotated})


def _kernels() -> AbstractContextManager[None]:
    """Gives newer models ways of rotating halves of channels that have a backward pass.

    comfy-kitchen 0.2.31 has none for these; ERNIE-Image and Cosmos-Predict2 call them.
    """
    kernels = getattr(sys.modules.get("comfy.quant_ops"), "ck", None)
    ours = {"apply_rope_split_half": _rotated_halves, "rms_rope_split_half": _normed_and_rotated}
    return _instead([] if kernels is None else [kernels], ours)


@contextmanager
def _instead(modules: Iterable[Any], functions: Mapping[str, Any]) -> Iterator[None]:
    """Puts functions in the place of those that modules have under the same names."""
    changed = []
    for module in modules:
        for name, ours in functions.items():
            if hasattr(module, name):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, ours)
    try:
        yield
    finally:
        for module, name, theirs in changed:
            setattr(module, name, theirs)


def _rotated_both(query: Tensor, key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, turns), _rotated(key, turns)


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Turns pairs of channels (..., D) by matrices (..., D / 2, 2, 2)."""
    pairs = x.to(turns.dtype).unflatten(-1, (-1, 1, 2))  # (..., D / 2, 1, 2)
    return (turns * pairs).sum(-1).reshape(x.shape).type_as(x)


def _rotated_halves(query: Tensor, key: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(query, turns), _halves(key, turns)


def _halves(x: Tensor, turns: Tensor) -> Tensor:
    """Turns each channel of the first half with its fellow of the second, see `_rotated`."""
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = _rotated(pairs.flatten(-2), turns).unflatten(-1, (-1, 2))
    return turned.transpose(-1, -2).flatten(-2)


def _normed_and_rotated(
    query: Tensor, key: Tensor, turns: Tensor, of_query: Tensor, of_key: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Normalises queries and keys (..., D) by weights (D,), then turns them."""
    query = rms_norm(query, of_query.shape, of_query, epsilon)
    return _rotated_halves(query, rms_norm(key, of_key.shape, of_key, epsilon), turns)


@contextmanager
def weights_with_gradients(model: nn.Module) -> Iterator[None]:
    """Lets gradients pass through the weights of a model, which stay frozen, and share memory.

    Weights that were loaded in inference mode cannot be saved for a backward pass. For as long as
    the context lasts, others with the same memory take their places.

    Args:
        model: ComfyUI's `BaseModel`.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for place in (module._parameters, module._buffers):
                for name, value in list(place.items()):
                    if value is not None and (value.is_inference() or _is_special(value)):
                        held.append((place, name, value))
                        place[name] = _alias(value)
        yield
    finally:
        for place, name, value in held:
            place[name] = value


def _alias(value: Tensor) -> Tensor:
    """Returns a tensor with the memory and the type of another, outside of inference mode."""
    if hasattr(value, "__tensor_flatten__"):  # a quantised tensor, made of others
        names, facts = value.__tensor_flatten__()
        inner = {name: _alias(getattr(value, name)) for name in names}
        whole: Tensor = type(value).__tensor_unflatten__(inner, facts, value.shape, value.stride())
        return whole
    plain = torch.empty(0, dtype=value.dtype, device=value.device)
    plain.set_(value.untyped_storage(), value.storage_offset(), value.size(), value.stride())
    if type(value) is nn.Parameter:
        return nn.Parameter(plain, requires_grad=False)
    if _is_special(value):
        plain = plain.as_subclass(_inert(type(value)))
        plain.__dict__.update(value.__dict__)
    return plain


def _is_special(value: Tensor) -> bool:
    return type(value) not in (Tensor, nn.Parameter)


@functools.cache
def _inert(kind: type[Tensor]) -> type[Tensor]:
    """Returns a class of tensors, derived from another, whose results are plain tensors.

    ComfyUI-GGUF keeps bytes in tensors of its own, with the type and the shape beside them. Where
    torch is asked to copy what is changed in place, their results would be of their class too.
    """
    # What torch documents for subclasses that shall not pass on to results.
    plain = {"__torch_function__": torch._C._disabled_torch_function_impl}
    return type(kind.__name__, (kind,), plain)
