"""What the hooks at sites and outputs have in common: their module, and how they are copied.

Nothing here runs in a forward call.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch.utils.hooks import RemovableHandle

from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks


class AtSite:
    """What an attached patch does at one module of the model, within the calls of its hooks.

    Args:
        hooks: the hooks of the attachment.
        name: the name of the site, for error messages.
        module: the module.
    """

    def __init__(self, hooks: CallHooks, name: str, module: nn.Module) -> None:
        self.hooks = hooks
        self.module: Callable[[], Any] = weakref.ref(module)
        self.name = name
        self.handles: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> AtSite:
        hooks = copy.deepcopy(self.hooks, memo)
        if hooks is self.hooks:  # a part of the model alone was copied
            return self
        if id(self) not in memo:
            other = memo[id(self)] = object.__new__(type(self))
            for name, value in vars(self).items():
                if name == "module":
                    other.__dict__[name] = copied_reference(value, memo)
                else:
                    other.__dict__[name] = copy.deepcopy(value, memo)
        copied: AtSite = memo[id(self)]
        return copied

    def outside(self) -> PatchError:
        """Returns the error about a module that is called outside of a call of the model."""
        return PatchError(
            f"site {self.name} was called outside of a forward call of the model, so its timestep "
            "is unknown: call the whole model (under gradient checkpointing, through the model's "
            "own `enable_gradient_checkpointing`, and attach and remove patches only when the "
            "backward pass is done)."
        )


def copied_reference(reference: Callable[[], Any], memo: dict[int, Any]) -> weakref.ref[nn.Module]:
    """Returns a weak reference to the deep copy of the module that a reference refers to."""
    return weakref.ref(copy.deepcopy(reference(), memo))
