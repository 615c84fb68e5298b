"""Puts the torch hooks of a patch on a model, and takes them off; `call.py` is what they do."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dmp_common.attach.atsite import copied_reference
from dmp_common.attach.call import InCall, OutputHook, SiteHook
from dmp_common.attach.checkpointing import unbind
from dmp_common.attach.experts import ExpertWatch
from dmp_common.attach.guided import Conditional, Sign
from dmp_common.attach.innertime import InnerTime
from dmp_common.attach.marking import mark, unmark
from dmp_common.attach.modulation import parts_of
from dmp_common.attach.places import remove, settle
from dmp_common.attach.regions import around, recompile
from dmp_common.attach.runtime import Runtime
from dmp_common.attach.settings import Dials, Settings
from dmp_common.bases.base import find_module
from dmp_common.bases.parts import Naming, TimeSource
from dmp_common.errors import PatchError


class CallHooks(InCall):
    """The hooks of one attachment, and their state. The state of a call is kept in `here`.

    References to the model are weak, because hosts may load another one while an attachment exists.

    Args:
        denoiser: the model.
        runtime: the runtime of the patch.
        naming: the naming of the model.
        settings: how the patch is used at first.

    Attributes:
        here: its attribute `call` is, for each thread, the forward call that the thread makes.
        active: whether the patch is on the model; `remove` sets it to False.
        settings, dials: how the patch is used, as numbers and as tensors.
        item_strengths: factors of the strength of each item (B,), None where all are 1.
        conditional: tells which of B items are conditional, for guidance patches.
        sign: what else tells them, see `guided.py`.
        kept: arguments that calls do not get, see `Base.kept`.
        watch: looks whether the patch is on the expert that it was made for, if it is for one.
        enabled, timed: whether the patch acts, and whether its strength depends on the timestep.
        calls: the number of forward calls in which the model embedded its timestep, without those
            in compiled code.
        compiled: whether compiled code embedded the timestep.
    """

    def __init__(
        self, denoiser: nn.Module, runtime: Runtime, naming: Naming, settings: Settings
    ) -> None:
        patch = runtime.patch
        self.denoiser: Callable[[], Any] = weakref.ref(denoiser)
        self.runtime, self.naming = runtime, naming
        self.here = threading.local()
        self.active = True
        self.calls = 0
        self.compiled = False
        self.item_strengths: Tensor | None = None
        self.conditional: Conditional | None = None
        self.sign: Sign = None
        expert = patch.variant.expert
        self.watch = None if expert is None else ExpertWatch(patch.variant)
        self.base = patch.base
        self.source = patch.base.times[naming]
        # Older compilers cannot look it up in the base's table.
        self.latent_of: Any = patch.base.latent.get(naming)
        self.kept = patch.base.kept if patch.modulates else ()
        self.no_label = _no_label(denoiser, self.source)
        self.sums_labels = patch.variant.condition == "t+y"
        self._time = _module(denoiser, self.source.path)
        self.inner_time = InnerTime(self._time, self.sums_labels)
        self.use(settings, True)
        self.checkpointing = [
            weakref.ref(m) for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")
        ]
        self.handles: list[RemovableHandle] = [
            denoiser.register_forward_pre_hook(self.begin, with_kwargs=True),
            denoiser.register_forward_hook(self.end, always_call=True),
        ]
        if not self.source.inside:
            self.handles.append(self._time.register_forward_hook(self.embedding))
            if self.sums_labels:
                labels = _module(denoiser, str(self.source.labels))
                self.handles.append(labels.register_forward_hook(self.embedding))
        self.sites: list[SiteHook] = []
        self.outputs: list[OutputHook] = []
        self.regions: list[Callable[[], Any]] = []
        if patch.modulates:
            self._put_on_outputs(denoiser)
        else:
            self._put_on_inputs(denoiser)
        self.marked = self._mark(denoiser)

    def _put_on_inputs(self, denoiser: nn.Module) -> None:
        self.sites += [
            SiteHook(self, site, _module(denoiser, site.paths[self.naming]))
            for site in self.runtime.patch.sites.values()
        ]
        for site in self.sites:
            settle(site)

    def _put_on_outputs(self, denoiser: nn.Module) -> None:
        parts = parts_of(self.runtime.patch.sites.values(), self.naming)
        modules = {path: _module(denoiser, path) for path in parts}  # all, before the first hook
        self.outputs += [OutputHook(self, parts[path], modules[path]) for path in parts]
        self.regions += [weakref.ref(module) for module in around(denoiser, parts)]

    def use(self, settings: Settings, enabled: bool) -> None:
        """Sets how the patch is used from the next call on."""
        self.settings, self.enabled = settings, enabled
        self.timed = self.runtime.needs_timesteps(settings)
        self.dials = Dials(settings, tuple(self.runtime.patch.sites), enabled)

    def remove(self) -> None:
        """Takes all hooks and wrappers off the model. Calling it again does nothing."""
        # Compiled graphs have no guards on hooks, but they have one on this flag.
        self.active = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for site in self.sites:
            remove(site)
        for output in self.outputs:
            for handle in output.handles:
                handle.remove()
        for region in self.regions:
            module = region()
            if module is not None:
                recompile(module, self)
        self.sites.clear()
        self.outputs.clear()
        self.regions.clear()
        for marked in self.marked:
            unmark(marked())
        self.marked.clear()
        for part in self.checkpointing:
            unbind(part(), self)
        self.checkpointing.clear()
        self.here.call = None

    def _mark(self, denoiser: nn.Module) -> list[Callable[[], Any]]:
        """Marks all modules with hooks, so that no graph without this patch is used for them."""
        modules = [denoiser, self._time]
        modules += [site.module() for site in self.sites if site.where == "hook"]
        modules += [output.module() for output in self.outputs]
        return [weakref.ref(module) for module in modules if mark(module)]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallHooks:
        """Copies the hooks along with their model.

        A copy of a part of the model, as PEFT makes it, keeps these hooks: it may replace the part
        and then belongs to the same calls.
        """
        denoiser = self.denoiser()
        if id(denoiser) not in memo:
            return self
        other = object.__new__(type(self))
        memo[id(self)] = other
        own: dict[str, Any] = {"here": threading.local()}
        own["denoiser"] = weakref.ref(memo[id(denoiser)])
        own["checkpointing"] = [copied_reference(part, memo) for part in self.checkpointing]
        own["regions"] = [copied_reference(part, memo) for part in self.regions]
        own["marked"] = [copied_reference(part, memo) for part in self.marked]
        for name, value in vars(self).items():
            other.__dict__[name] = own[name] if name in own else copy.deepcopy(value, memo)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "expected a model without attached patches to pickle, found one with a patch: call "
            "`remove()` first, and save the patch with `patch.save(...)`."
        )


def _no_label(denoiser: nn.Module, source: TimeSource) -> int | None:
    """Returns the class label that stands for no class: the last one, where the base has labels."""
    if source.labels is None:
        return None
    table = find_module(denoiser, f"{source.labels}.embedding_table")
    return table.num_embeddings - 1 if isinstance(table, nn.Embedding) else None


def _module(denoiser: nn.Module, path: str) -> nn.Module:
    module = find_module(denoiser, path)
    if module is None:
        raise PatchError(f"expected a module at {path}, found none: is this the whole model?")
    return module
