"""What runs in a forward call of a model with an attached patch.

The hooks of the model begin and end a `Call`, which makes the context once the time embedding is
known; the hooks at the sites then add to inputs or change outputs with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from dmp_common.attach.atsite import AtSite
from dmp_common.attach.checkpointing import bind
from dmp_common.attach.context import Context
from dmp_common.attach.forms import as_given, as_tokens
from dmp_common.attach.guided import Sign, is_doubled, is_second
from dmp_common.attach.modulation import Part
from dmp_common.attach.places import COMPILED, REGISTRY, moved, settle
from dmp_common.attach.regions import uncompile
from dmp_common.bases.parts import Argument, ModelCall, Site, TimeSource
from dmp_common.compat import function_transform, is_compiling
from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks


class InCall:
    """What the hooks of an attachment do at the model itself; `CallHooks` installs them."""

    here: threading.local
    active: bool
    enabled: bool
    source: TimeSource
    kept: tuple[Argument, ...]
    sign: Sign
    sites: list[SiteHook]
    regions: list[Callable[[], Any]]
    checkpointing: list[Callable[[], Any]]

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Records the arguments of the call. Must not read weights: they may be offloaded here.

        Returns:
            The arguments, where some are left out, see `Base.kept`: also while the patch is off,
            because a later call may be one with it.
        """
        if not self.active:
            return None
        if self.kept:
            args, kwargs = ModelCall(args, kwargs).without(self.kept, self.enabled)
        call = self.here.call = Call(self, args, kwargs)  # type: ignore[arg-type]
        if not is_compiling():
            if self.sign == "doubled":
                call.doubled = is_doubled(args, kwargs)
            elif self.sign == "order":
                call.second = is_second(self.here, args, kwargs)
            self._settle(call)
        return (args, kwargs) if self.kept else None

    def _settle(self, call: Call) -> None:
        """Makes the hooks fit what became of the model's modules since the last call."""
        call.off = not self.enabled
        for site in self.sites:
            place = site.module()
            if place is None:  # another module has replaced it, with a copy of its hooks
                continue
            own = vars(place)
            if (site.where != "hook" or COMPILED in own or REGISTRY in own) and moved(site):
                settle(site)
        for region in self.regions:
            module = region()
            if module is not None and COMPILED in vars(module):
                uncompile(module, self)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            for part in self.checkpointing:
                bind(part(), self)  # type: ignore[arg-type]

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the call, also after an error, so that a site that is called later does not see it.

        After an interrupt (a BaseException) torch does not call this; the next call replaces it.
        """
        self.here.call = None

    def embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Receives the time embedding, or the embedding of labels, that the model has computed."""
        call = getattr(self.here, "call", None)
        if call is not None and self.active and not call.off:
            if self.source.row is not None or isinstance(output, tuple):
                output = self.source.embedding(output)
            call.embedded(output)


class Call:
    """One forward call of the model: its arguments and, once known, its context."""

    def __init__(self, hooks: CallHooks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hooks = hooks
        self.args, self.kwargs = args, kwargs
        # Whether it is the unconditional call of a step, or has both sides, see `guided.py`.
        self.second = self.doubled = False
        self.off = False  # whether the attachment was disabled when the call began
        self.context: Context | None = None
        # The gate sees the sum of the embeddings: how many are missing yet, and the sum so far.
        self.missing = 2 if hooks.sums_labels and not hooks.source.inside else 1
        self.sum: Tensor | None = None

    def embedded(self, e: Tensor) -> None:
        """Adds up the embeddings that the gate sees; makes the context after the last.

        Args:
            e: of each item (B, E), or of each token (B, L, E).
        """
        e = e if self.sum is None else self.sum + e
        self.sum, self.missing = e, self.missing - 1
        if self.missing:
            return
        hooks, timesteps, dials, latent = self.hooks, None, None, None
        # `is_transforming` is written out, because this function runs in every call.
        if is_compiling() or forward_ad._current_level >= 0 or function_transform() is not None:
            dials = hooks.dials
        if dials is not None or hooks.timed or hooks.watch is not None:
            timesteps = hooks.source.timesteps(self.timesteps(e))
        if hooks.base.layout == "tokens":
            call = ModelCall(self.args, self.kwargs)
            latent = hooks.latent_of(hooks.base, call, hooks.denoiser())
            # Wan 2.2 may embed a timestep for each token. Qwen-Image-Edit embeds timestep 0 too,
            # after the items.
            e = latent.rows(e.flatten(0, 1)) if e.dim() == 3 else e[: latent.batch * latent.frames]
            if timesteps is not None:
                timesteps = latent.rows(timesteps)
        if is_compiling():
            hooks.compiled = True  # The graph does so in each call; a sum would be fixed in it.
        else:
            hooks.calls += 1
            if hooks.watch is not None and timesteps is not None:
                hooks.watch(timesteps)
        conditional = None
        if hooks.runtime.patch.variant.guidance is not None:
            conditional = self.conditional(len(e) if latent is None else latent.batch)
        self.context = hooks.runtime.prepare(
            e,
            latent,
            hooks.settings,
            timesteps=timesteps,
            dials=dials,
            items=hooks.item_strengths,
            conditional=conditional,
        )

    def late(self, site: str, x: Tensor) -> Context:
        """Makes the context at the first site, for models that embed the timestep in a block.

        Raises:
            PatchError: the model should have embedded its timestep before, and did not.
        """
        hooks = self.hooks
        if not hooks.source.inside:
            raise PatchError(
                f"expected the model to embed its timestep before site {site} of base "
                f"{hooks.base.name}, and it did not: is its forward replaced?"
            )
        labels = ModelCall(self.args, self.kwargs).get(hooks.base.labels)
        self.embedded(hooks.inner_time(self.timesteps(x), labels, x.dtype))
        assert self.context is not None
        return self.context

    def conditional(self, items: int) -> Tensor | None:
        """Returns which items of the call are conditional (B,), or None if all are taken as such.

        Items of a base with class labels are unconditional where they have the last label, which
        stands for none.
        """
        hooks = self.hooks
        if hooks.conditional is not None:
            told = hooks.conditional(items)
            if told is not None:
                return told
        if self.second:
            return torch.zeros(items, dtype=torch.bool)
        if self.doubled:
            return torch.arange(items) >= items // 2
        labels = ModelCall(self.args, self.kwargs).get(hooks.base.labels)
        if hooks.no_label is None or not isinstance(labels, Tensor):
            return None
        return labels != hooks.no_label

    def timesteps(self, like: Tensor) -> Tensor:
        """Returns the timesteps of the call (B,), on the device of `like`."""
        given = ModelCall(self.args, self.kwargs).get(self.hooks.source.argument)
        return torch.as_tensor(given, device=like.device).reshape(-1)


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
        self.form = parts[0].form
        self.handles.append(module.register_forward_hook(self.after))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Changes the module's output."""
        hooks = self.hooks
        if not hooks.active:
            return None
        call = getattr(hooks.here, "call", None)
        if call is None:
            raise self.outside()
        if call.off:
            return None
        context = call.context or call.late(self.name, output)
        form = self.form
        if form is None:  # Calls of functions cost time here, and most have no form.
            modulated: Tensor = context.modulate(self.parts, output)
            return modulated
        return as_given(context.modulate(self.parts, as_tokens(output, form)), output, form)


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
        self.argument, self.form = site.arguments[hooks.naming], site.forms.get(hooks.naming)
        self.prepends = hooks.runtime.patch.variant.mix == "prepend"
        self.where: Literal["hook", "inside", "outside"] | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds the prompts to the module's input."""
        hooks = self.hooks
        if not hooks.active:
            return None
        call = getattr(hooks.here, "call", None)
        if call is None:
            raise self.outside()
        if call.off:
            return None
        index, name = self.argument.index, self.argument.name
        if len(args) > index:
            x = args[index]
        elif name in kwargs:
            x = kwargs[name]
        else:
            raise self._missing(args, kwargs)
        context = call.context or call.late(self.name, x)
        act = context.prepend if self.prepends else context.add
        form = self.form
        if form is None:
            x = act(self.name, x)
        else:
            x = as_given(act(self.name, as_tokens(x, form)), x, form)
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
