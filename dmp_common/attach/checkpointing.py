"""Gradient checkpointing: recomputation must meet the context of its own forward call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from dmp_common.compat import is_compiling

if TYPE_CHECKING:
    from dmp_common.attach.hooks import Attachment


class BoundCheckpoint:
    """A gradient checkpointing function that recomputes with the context of its own forward.

    Without it, recomputation during backward would meet whatever call came last, and gradients
    would be silently wrong when a second forward came in between.
    """

    def __init__(self, attachment: Attachment, inner: Callable[..., Any]) -> None:
        self.attachment = attachment
        self.inner = inner

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        attachment, call = self.attachment, self.attachment._call
        if call is None or is_compiling():
            return self.inner(module, *args)
        if attachment._source.inside:
            call.context_for(args[0])  # now, or it would be computed during recomputation

        def run(*inputs: Any) -> Any:
            previous, attachment._call = attachment._call, call
            try:
                return module(*inputs)
            finally:
                attachment._call = previous

        return self.inner(run, *args)


def bind(module: Any, attachment: Attachment) -> None:
    """Binds the checkpointing function of a module, where it has one in use, once."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not module.gradient_checkpointing or function is None:
        return
    known = function
    while isinstance(known, BoundCheckpoint):
        if known.attachment is attachment:
            return
        known = known.inner
    module._gradient_checkpointing_func = BoundCheckpoint(attachment, function)


def unbind(module: Any, attachment: Attachment) -> None:
    """Gives a module its own checkpointing function back, also from under other bindings."""
    owner, name = module, "_gradient_checkpointing_func"
    function = getattr(owner, name, None)
    while isinstance(function, BoundCheckpoint):
        if function.attachment is attachment:
            setattr(owner, name, function.inner)
            return
        owner, name, function = function, "inner", function.inner
