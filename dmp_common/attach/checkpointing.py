"""Makes gradient checkpointing recompute blocks with the context of their own forward call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmp_common.attach.wrapping import Wrapping, is_wrapped, unwrap
from dmp_common.compat import is_compiling
from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks

_FUNCTION = "_gradient_checkpointing_func"


class BoundCheckpoint(Wrapping):
    """A gradient checkpointing function that recomputes with the context of its own forward call.

    Without it, recomputation in the backward pass would use the context of the latest call, and
    gradients would be silently wrong if another forward call came in between.
    """

    owner: CallHooks

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = self.owner
        call = getattr(hooks.here, "call", None)
        if call is None or is_compiling():
            return self.inner(module, *args, **kwargs)
        if call.context is None and not call.off:
            call.late("0", args[0])  # otherwise recomputation would make it

        def run(*inputs: Any, **more: Any) -> Any:
            if not hooks.active:
                raise PatchError(
                    "expected the patch to be on the model until the backward pass of a "
                    "checkpointed forward, which recomputes the blocks, and it was removed: call "
                    "`remove()` after `backward()`."
                )
            # The backward pass may run in a thread of its own.
            previous = getattr(hooks.here, "call", None)
            hooks.here.call = call
            try:
                return module(*inputs, **more)
            finally:
                hooks.here.call = previous

        return self.inner(run, *args, **kwargs)


def bind(module: Any, hooks: CallHooks) -> None:
    """Wraps the checkpointing function of a module, if it uses one that is not wrapped yet."""
    function = getattr(module, _FUNCTION, None)
    if not module.gradient_checkpointing or function is None or is_wrapped(function, hooks):
        return
    setattr(module, _FUNCTION, BoundCheckpoint(hooks, function))


def unbind(module: Any, hooks: CallHooks) -> None:
    """Restores a module's own checkpointing function, also where other bindings are around ours."""
    unwrap(module, _FUNCTION, hooks)
