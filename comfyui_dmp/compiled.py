"""Compiled graphs of one model, told apart: one for each way a patch acts, and the plain one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch.nn as nn

from dmp_common import PatchError

_MANY = 256  # graphs to keep; one that is forgotten is compiled again


@contextmanager
def own_graph(denoiser: nn.Module, facts: object) -> Iterator[None]:
    """Compiles and finds the graphs of calls with a patch apart from those of other calls.

    ComfyUI's compile nodes do not watch `transformer_options`, where a patch is, so a graph made
    with one patch would serve a call with another, or with none. Graphs belong to the code
    object they were made from: for the time of a call the model's forward gets one of its own.

    Args:
        denoiser: the model itself, not the compiled one that stands in for it.
        facts: all that the graph of the patch depends on, besides the values of tensors. Patches
            on the same model stack.
    """
    before = denoiser.__dict__.get("forward")
    name = repr(facts)
    if before is not None:
        if not isinstance(before, MethodType) or before.__func__.__globals__ is not globals():
            raise PatchError(
                f"expected a compiled {type(denoiser).__name__} with its own forward, found one "
                "that another extension replaced: remove the compile node, or that extension."
            )
        name = f"{before.__func__.__name__} {name}"  # the patch of another Apply DMP
    denoiser.forward = MethodType(_forward_of(name), denoiser)
    try:
        yield
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


@functools.lru_cache(_MANY)
def _forward_of(name: str) -> FunctionType:
    """A forward with a code object of its own."""
    return FunctionType(_forward.__code__.replace(co_name=name), globals(), name)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)
