"""Marks the modules that have hooks, so that `torch.compile` does not use graphs without them.

The compiler keeps the graphs of a function for all modules that run it, and makes several graphs of
one where code in between is not compiled. Each graph has guards, and is used where they hold. They
tell one hook from another, but not a module with a hook from one without. They do tell whether a
module has a `forward` of its own, so each module with a hook gets its usual one as its own.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn


def mark(module: nn.Module) -> bool:
    """Marks a module, and returns whether it is marked: not if it has another `forward` already."""
    if "forward" not in vars(module):
        module.forward = module.forward
    return _is_marked(module)


def unmark(module: nn.Module | None) -> None:
    """Takes the mark of a module away, unless another patch has a hook on it or it is gone."""
    if module is not None and _is_marked(module) and not _has_hooks(module):
        del module.forward


def _is_marked(module: nn.Module) -> bool:
    forward: Any = vars(module).get("forward")
    usual: Any = type(module).forward
    return getattr(forward, "__self__", None) is module and forward.__func__ is usual


def _has_hooks(module: nn.Module) -> bool:
    """Tells whether a module has hooks of a patch: bound methods of classes of this package."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    owners = (type(getattr(hook, "__self__", None)) for hook in hooks)
    return any(owner.__module__.startswith(__package__) for owner in owners)
