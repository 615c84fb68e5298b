"""What a diffusers scheduler says of its base."""

from __future__ import annotations

from typing import Any


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is of a flow model; it has no prediction type then."""
    return "FlowMatch" in type(scheduler).__name__


def flux_shift(tokens: int) -> float:
    """Logarithm of the shift that Flux takes for a picture of so many tokens."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
