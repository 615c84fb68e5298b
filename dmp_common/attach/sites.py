"""The hooks at the sites of an attached patch, where prompts reach the model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dmp_common.bases.parts import Site
from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks


class SiteHook:
    """The addition of prompts at one site, at the place that `places` chooses.

    Args:
        hooks: the hooks of the attachment.
        site: the site.
        module: the module whose input the site is.

    Attributes:
        where: the place, see `places`; None while it has none.
        handles: the handles of its torch hooks, at the place "hook".
    """

    def __init__(self, hooks: CallHooks, site: Site, module: nn.Module) -> None:
        self.hooks = hooks
        self.module: Callable[[], Any] = weakref.ref(module)
        self.name = site.name
        self.argument = site.arguments[hooks.naming]
        self.prepends = hooks.runtime.patch.variant.mix == "prepend"
        self.where: Literal["hook", "inside", "outside"] | None = None
        self.handles: list[RemovableHandle] = []

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds the prompts to the module's input."""
        hooks, index, name = self.hooks, self.argument.index, self.argument.name
        if not hooks.active:
            return None
        call = getattr(hooks.here, "call", None)
        if call is None:
            raise self._outside_of_a_call()
        if call.off:
            return None
        if len(args) > index:
            x = args[index]
        elif name in kwargs:
            x = kwargs[name]
        else:
            raise self._missing(args, kwargs)
        context = call.context
        if context is None:
            context = call.late(self.name, x)
        x = context.prepend(self.name, x) if self.prepends else context.add(self.name, x)
        if len(args) > index:
            return (*args[:index], x, *args[index + 1 :]), kwargs
        return args, {**kwargs, name: x}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Removes prepended prompts from the module's output."""
        call = getattr(self.hooks.here, "call", None)
        if not self.hooks.active or call is None or call.off:
            return None
        stripped: Tensor = call.context.strip(self.name, output)
        return stripped

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteHook:
        hooks = copy.deepcopy(self.hooks, memo)
        if hooks is self.hooks:  # a part of the model alone was copied
            return self
        if id(self) not in memo:
            other = memo[id(self)] = object.__new__(type(self))
            for name, value in vars(self).items():
                own = (
                    copied_reference(value, memo)
                    if name == "module"
                    else copy.deepcopy(value, memo)
                )
                other.__dict__[name] = own
        copied: SiteHook = memo[id(self)]
        return copied

    def _outside_of_a_call(self) -> PatchError:
        return PatchError(
            f"site {self.name} was called outside of a forward call of the model, so its timestep "
            "is unknown: call the whole model (under gradient checkpointing, through the model's "
            "own `enable_gradient_checkpointing`, and attach and remove patches only when the "
            "backward pass is done)."
        )

    def _missing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PatchError:
        found = f"{len(args)} positional ones and {', '.join(kwargs) or 'no others'}"
        return PatchError(
            f"site {self.name} expected the block's input as argument {self.argument.index} or as "
            f"{self.argument.name}=, found {found}: this model calls its blocks in a way that is "
            "not supported."
        )


def copied_reference(reference: Callable[[], Any], memo: dict[int, Any]) -> weakref.ref[nn.Module]:
    """Returns a weak reference to the deep copy of the module that a reference refers to."""
    return weakref.ref(copy.deepcopy(reference(), memo))
