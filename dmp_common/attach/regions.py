"""Runs compiled parts of a model as they are written while a modulating patch is on the model.

`compile_repeated_blocks` compiles each block by itself. The compiler sets no guards on hooks, so a
graph that was compiled without the patch would go on without it, and one that was compiled with it
would be used for other blocks. Whole models that are compiled after attaching do not need this: the
hooks are in their graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from dmp_common.attach.places import COMPILED
from dmp_common.attach.wrapping import Wrapping, is_wrapped, unwrap

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks


class AsWritten(Wrapping):
    """A wrapper of a compiled module that calls the module itself while the patch acts."""

    owner: CallHooks

    def __init__(self, owner: CallHooks, inner: Any, module: nn.Module) -> None:
        super().__init__(owner, inner)
        self.module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self.owner.here, "call", None)
        module = self.module()
        if not self.owner.active or call is None or call.off or module is None:
            return self.inner(*args, **kwargs)
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def around(denoiser: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Returns the modules on the way from a model to the modules at some paths, these included."""
    names: set[str] = set()
    for path in paths:
        parts = path.split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return [module for name, module in denoiser.named_modules() if name in names]


def uncompile(module: nn.Module, hooks: CallHooks) -> None:
    """Wraps the compiled call of a module, if it has one that is not wrapped yet.

    Other patches may have wrappers around it; ours goes inside them all, so that these still act.
    """
    call: Any = vars(module).get(COMPILED)
    if call is None or is_wrapped(call, hooks):
        return
    holder: Any = module
    name = COMPILED
    while isinstance(call, Wrapping):
        holder, name, call = call, "inner", call.inner
    setattr(holder, name, AsWritten(hooks, call, module))


def recompile(module: nn.Module, hooks: CallHooks) -> None:
    """Takes the wrapper of `uncompile` away again."""
    if COMPILED in vars(module):
        unwrap(module, COMPILED, hooks)
