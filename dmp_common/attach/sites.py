"""The hooks at the sites of an attached patch, where prompts reach the model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dmp_common.attach.modulation import Part
from dmp_common.bases.parts import Site
from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.call import Call
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

    def call(self) -> Call | None:
        """Returns the forward call that this thread makes, or None where the patch is off.

        Raises:
            PatchError: the module was called outside of a forward call of the model.
        """
        hooks = self.hooks
        if not hooks.active:
            return None
        call: Call | None = getattr(hooks.here, "call", None)
        if call is None:
            raise PatchError(
                f"site {self.name} was called outside of a forward call of the model, so its "
                "timestep is unknown: call the whole model (under gradient checkpointing, through "
                "the model's own `enable_gradient_checkpointing`, and attach and remove patches "
                "only when the backward pass is done)."
            )
        return None if call.off else call


class OutputHook(AtSite):
    """The scaling and shifting of a module's output.

    Args:
        hooks: the hooks of the attachment.
        parts: the sites whose channels the output holds.
        module: the module.
    """

    def __init__(self, hooks: CallHooks, parts: tuple[Part, ...], module: nn.Module) -> None:
        super().__init__(hooks, parts[0].site, module)
        self.parts = parts
        self.handles.append(module.register_forward_hook(self.after))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Changes the module's output."""
        call = self.call()
        if call is None:
            return None
        context = call.context
        if context is None:
            context = call.late(self.name, output)
        return context.modulate(self.parts, output)


class SiteHook(AtSite):
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
        super().__init__(hooks, site.name, module)
        self.argument = site.arguments[hooks.naming]
        self.prepends = hooks.runtime.patch.variant.mix == "prepend"
        self.where: Literal["hook", "inside", "outside"] | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds the prompts to the module's input."""
        call = self.call()
        if call is None:
            return None
        index, name = self.argument.index, self.argument.name
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
