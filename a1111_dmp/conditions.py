"""Which items of a model's calls are conditional: guidance patches act on these alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

_CONDITIONAL = 0  # Forge's number of the positive condition


class Conditions:
    """Follows the calls of a sampling, and tells which items of the last one are conditional.

    In A1111 a step has the conditional items first and then the unconditional ones. They reach the
    model in this order, in one call or in several. Forge and its siblings say in the options of
    each call what its parts are.
    """

    def __init__(self) -> None:
        self._items = self._conditional = self._place = 0
        self._kinds: Tensor | None = None

    def step(self, items: int, conditional: int) -> None:
        """Begins a step of the sampler.

        Args:
            items: all items of the step.
            conditional: how many of them are conditional; these come first.
        """
        self._items, self._conditional, self._place = items, conditional, 0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a call of the model; a forward pre-hook of it."""
        items = len(args[0] if args else kwargs["x"])
        kinds = (kwargs.get("transformer_options") or {}).get("cond_or_uncond")
        if kinds and items % len(kinds) == 0:
            told = torch.tensor([kind == _CONDITIONAL for kind in kinds])
            self._kinds = told.repeat_interleave(items // len(kinds))
        elif self._items:
            places = torch.arange(self._place, self._place + items) % self._items
            self._kinds = places < self._conditional
            self._place = (self._place + items) % self._items
        else:
            self._kinds = None

    def __call__(self, items: int) -> Tensor | None:
        """Returns which items of the call are conditional (B,), None where it is not known."""
        return self._kinds if self._kinds is not None and len(self._kinds) == items else None
