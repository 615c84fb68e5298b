"""Separate compiled graphs for the plain model and for each way in which a patch acts on it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch.nn as nn

from dmp_common import PatchError

_MANY = 256  # How many graphs are kept. One that was dropped is compiled again when needed.


@contextmanager
def own_graph(denoiser: nn.Module, facts: object) -> Iterator[None]:
    """Keeps the compiled graphs of calls with a patch apart from those of other calls.

    A patch is in `transformer_options`, on which ComfyUI's compile nodes set no guards: a graph
    that was compiled with one patch would also be used for a call with another patch, or without
    one. torch keeps graphs by the code object that they were compiled from. So the model's forward
    gets a code object of its own for the time of the call.

    Args:
        denoiser: the original model, not the compiled one that replaces it.
        facts: everything that the graph of the patch depends on, except the values of tensors.
            Several patches may be on one model; their facts are combined.
    """
    before = denoiser.__dict__.get("forward")
    name = repr(facts)
    if before is not None:
        if not isinstance(before, MethodType) or before.__func__.__globals__ is not globals():
            raise PatchError(
                f"expected a compiled {type(denoiser).__name__} with its own forward, found one "
                "that another extension replaced: remove the compile node, or that extension."
            )
        name = f"{before.__func__.__name__} {name}"  # Another Apply DMP node is on this model.
    denoiser.forward = MethodType(_forward_of(name), denoiser)
    try:
        yield
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


@functools.lru_cache(_MANY)
def _forward_of(name: str) -> FunctionType:
    """Makes a forward function with a code object of its own."""
    return FunctionType(_forward.__code__.replace(co_name=name), globals(), name)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)
