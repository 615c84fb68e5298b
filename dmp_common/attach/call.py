"""One forward call of a model with an attached patch: its arguments, and what it adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmp_common.attach.context import Context
from dmp_common.bases.parts import ModelCall
from dmp_common.compat import function_transform, is_compiling
from dmp_common.errors import PatchError

if TYPE_CHECKING:
    from dmp_common.attach.hooks import CallHooks


class Call:
    """One forward call of the model: its arguments and, once known, its context."""

    def __init__(self, hooks: CallHooks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hooks = hooks
        self.args, self.kwargs = args, kwargs
        self.off = False  # whether the attachment was disabled when the call began
        self.context: Context | None = None
        # The gate sees the sum of the embeddings: how many are missing yet, and the sum so far.
        self.missing = 2 if hooks.sums_labels and not hooks.source.inside else 1
        self.sum: Tensor | None = None

    def embedded(self, e: Tensor) -> None:
        """Adds up the embeddings (B, E) that the gate sees; makes the context after the last."""
        e = e if self.sum is None else self.sum + e
        self.sum, self.missing = e, self.missing - 1
        if self.missing:
            return
        hooks, timesteps, dials, latent = self.hooks, None, None, None
        # `is_transforming` is written out, because this function runs in every call.
        if is_compiling() or forward_ad._current_level >= 0 or function_transform() is not None:
            dials = hooks.dials
        if dials is not None or hooks.timed:
            timesteps = hooks.source.timesteps(self.timesteps(e))
        if hooks.base.layout == "tokens":
            call = ModelCall(self.args, self.kwargs)
            latent = hooks.base.latent[hooks.naming](hooks.base, call, hooks.denoiser())
            e = e[: latent.batch]  # Qwen-Image-Edit embeds timestep 0 too, after the items
        if not is_compiling():
            hooks.calls += 1
        conditional = None
        if hooks.runtime.patch.variant.guidance is not None:
            conditional = self.conditional(len(e))
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
        labels = ModelCall(self.args, self.kwargs).get(hooks.base.labels)
        if hooks.no_label is None or not isinstance(labels, Tensor):
            return None
        return labels != hooks.no_label

    def timesteps(self, like: Tensor) -> Tensor:
        """Returns the timesteps of the call (B,), on the device of `like`."""
        given = ModelCall(self.args, self.kwargs).get(self.hooks.source.argument)
        return torch.as_tensor(given, device=like.device).reshape(-1)
