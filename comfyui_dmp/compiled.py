"""Separate compiled graphs for the plain model and for each way in which a patch acts on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType

import torch
import torch.nn as nn

from dmp_common import Context, PatchError
from dmp_common.attach.masking import MaskedContext

_MANY = 2048  # How many methods are kept. Graphs of one that was dropped are compiled again.
_GRAPH = "dmp_graph"  # The attribute of our methods that tells whose graphs they have.


@contextmanager
def own_graph(denoiser: nn.Module, facts: object) -> Iterator[None]:
    """Keeps the compiled graphs of calls with a patch apart from those of other calls.

    A patch is in `transformer_options`, on which ComfyUI's compile nodes set no guards: a graph
    that was compiled with one patch would also be used for a call with another patch, or without
    one. torch keeps graphs by the code object that they were compiled from. So the model's methods
    get code objects of their own for the time of the call. Not only `forward`: where the graph
    breaks (some attention functions break it), each method is compiled by itself.

    Args:
        denoiser: the original model, not the compiled one that replaces it.
        facts: everything that the graph of the patch depends on, except the values of tensors.
            Several patches may be on one model; their facts are combined.
    """
    own = vars(denoiser)
    before = own.get("forward")
    graph = repr(facts)
    if before is not None:
        others = getattr(before, _GRAPH, None)
        if others is None:
            raise PatchError(
                f"expected a compiled {type(denoiser).__name__} with its own forward, found one "
                "that another extension replaced: remove the compile node, or that extension."
            )
        graph = f"{others} {graph}"  # Another Apply DMP node is on this model.
    methods = {name: getattr(denoiser, name) for name in _names_of(type(denoiser))}
    replaced = {name: own[name] for name in methods if name in own}
    for name, method in methods.items():
        if isinstance(method, MethodType):
            setattr(denoiser, name, MethodType(_copied(method.__func__, graph), denoiser))
    try:
        yield
    finally:
        for name in methods:
            own.pop(name, None)
        own.update(replaced)


@functools.cache
def _names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the methods that a class of models adds to those of every module."""
    kinds = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = {
        name: None
        for cls in kinds
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }
    return tuple(names)


@functools.lru_cache(_MANY)
def _copied(function: FunctionType, graph: str) -> FunctionType:
    """Returns a copy of a function with a code object of its own."""
    code = function.__code__.replace(co_name=f"{function.__name__} {graph}")
    arguments = function.__defaults__, function.__closure__
    copy = FunctionType(code, function.__globals__, function.__name__, *arguments)
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy)[_GRAPH] = graph
    return copy


def for_compiled(context: Context | MaskedContext) -> tuple[Context | MaskedContext, object]:
    """Prepares a context for a compiled graph, which would make numbers and cached fields fixed.

    Returns:
        The context, and the facts that its graph depends on.
    """
    if isinstance(context, MaskedContext):
        inner, facts = for_compiled(context.context)
        return context.around(inner), (facts, context.mask.shape)
    strength = torch.as_tensor(context.strength)
    facts = context.weights.shape, strength.shape
    plain = dataclasses.replace(context, strength=strength, remembered=None, cache=None, key=None)
    return plain, facts
