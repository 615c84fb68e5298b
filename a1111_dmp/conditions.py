"""What the items of a model's calls are: conditional or not, and of which picture of the batch.

Guidance patches act on the conditional items alone, and the prompts of a batch may name different
patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

_CONDITIONAL = 0  # Forge's number of the positive condition


class Conditions:
    """Follows the calls of a sampling, and tells what the items of the last one are.

    In A1111 a step has the conditional items first and then the unconditional ones. They reach the
    model in this order, in one call or in several. Forge and its siblings say in the options of
    each call what its parts are; each part has all pictures of the batch.

    Attributes:
        pictures: for each item of the last call its picture in the batch (B,); None where it is
            not known.
    """

    def __init__(self) -> None:
        self._items = self._conditional = self._place = 0
        self._step: Tensor | None = None
        self._kinds: Tensor | None = None
        self.pictures: Tensor | None = None

    def step(self, items: int, conditional: int, pictures: Sequence[int] | None = None) -> None:
        """Begins a step of the sampler.

        Args:
            items: all items of the step.
            conditional: how many of them are conditional; these come first.
            pictures: for each item its picture in the batch; None where it is not known.
        """
        self._items, self._conditional, self._place = items, conditional, 0
        self._step = None if pictures is None else torch.tensor(pictures)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follows a call of the model; a forward pre-hook of it."""
        items = len(args[0] if args else kwargs["x"])
        kinds = (kwargs.get("transformer_options") or {}).get("cond_or_uncond")
        self._kinds = self.pictures = None
        if kinds and items % len(kinds) == 0:
            batch = items // len(kinds)
            told = torch.tensor([kind == _CONDITIONAL for kind in kinds])
            self._kinds = told.repeat_interleave(batch)
            self.pictures = torch.arange(batch).repeat(len(kinds))
        elif self._items:
            places = torch.arange(self._place, self._place + items) % self._items
            self._kinds = places < self._conditional
            if self._step is not None:
                self.pictures = self._step[places]
            self._place = (self._place + items) % self._items

    def __call__(self, items: int) -> Tensor | None:
        """Returns which items of the call are conditional (B,), None where it is not known."""
        return self._kinds if self._kinds is not None and len(self._kinds) == items else None


def pictures_of(parts: Sequence[int], items: int) -> list[int] | None:
    """Returns for each item of an A1111 step its picture in the batch, None where it is not known.

    Args:
        parts: for each picture how many prompts it has; AND joins several.
        items: all items of the step: a part of each picture for each of its prompts, and then all
            pictures again for each unconditional part.

    >>> pictures_of([1, 2], 5)
    [0, 1, 1, 0, 1]
    """
    conditional = [picture for picture, count in enumerate(parts) for _ in range(count)]
    rest = items - len(conditional)
    if not parts or rest < 0 or rest % len(parts):
        return None
    return conditional + list(range(len(parts))) * (rest // len(parts))
