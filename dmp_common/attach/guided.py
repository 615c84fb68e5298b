"""Which items of a pipeline's calls are conditional, for guidance patches.

Pipelines of diffusers that guide call their model in one of three ways, see `Base.guided`: with the
unconditional items before the conditional ones, the other way round, or twice.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dmp_common.bases.base import Base
from dmp_common.bases.parts import Argument, ModelCall

# From the number of items B to which of them are conditional (B,), or None where all are.
Conditional = Callable[[int], "Tensor | None"]

# What in a call's arguments tells: its place after another call, or latents that are there twice.
Sign = Literal["order", "doubled"] | None

_LATENT, _TEXT = Argument("hidden_states", 0), Argument("encoder_hidden_states", 1)


def halves_of(model: Any, base: Base) -> Conditional | None:
    """Returns what tells the conditional items of a pipeline's calls, None where nothing does.

    Pipelines with class labels do not say whether they guide, but there the labels tell.

    Args:
        model: what a patch is attached to.
        base: of the patch.
    """
    if base.guided == "calls" or not hasattr(type(model), "do_classifier_free_guidance"):
        return None
    pipeline = weakref.ref(model)
    first = base.guided == "conditional first"

    def conditional(items: int) -> Tensor | None:
        # Before the pipeline's first call it has no guidance scale yet.
        if items % 2 or not getattr(pipeline(), "do_classifier_free_guidance", False):
            return None
        return (torch.arange(items) < items // 2) == first

    return conditional


def sign_of(model: Any, base: Base) -> Sign:
    """Returns what in a call's arguments tells its conditional items, if a pipeline does not."""
    if not hasattr(type(model), "components"):  # no pipeline
        return None
    if base.guided == "calls":
        return "order"
    silent = not hasattr(type(model), "do_classifier_free_guidance") and base.labels is None
    return "doubled" if silent and base.guided == "unconditional first" else None


def is_doubled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the latents of a call are there twice, as a pipeline gives them that guides."""
    latent = ModelCall(args, kwargs).get(_LATENT)
    even = isinstance(latent, Tensor) and len(latent) % 2 == 0
    return even and torch.equal(*latent.chunk(2))


def is_second(here: threading.local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is the second of a step; `here` keeps it for the next one of its thread."""
    this, last = LastCall(args, kwargs), getattr(here, "last", None)
    here.last = this
    return last is not None and last.is_first_of(this)


class LastCall:
    """The arguments of the last call, to tell that one is the second of a step: its latents are the
    same object and its text is another. Pipelines make the conditional call first."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ModelCall(args, kwargs)
        latent, text = call.get(_LATENT), call.get(_TEXT)
        self._given = [weakref.ref(each) for each in (latent, text) if isinstance(each, Tensor)]

    def is_first_of(self, other: LastCall) -> bool:
        """Whether another call, which comes after this one, is the second of the same step."""
        if len(self._given) != 2 or len(other._given) != 2:
            return False
        (latent, text), (its_latent, its_text) = (
            [reference() for reference in call._given] for call in (self, other)
        )
        return latent is not None and latent is its_latent and text is not its_text
