"""Tokens as a model holds them, and as (B, L, D)."""

from __future__ import annotations

from torch import Tensor

from dmp_common.bases.parts import Form


def as_tokens(x: Tensor, form: Form | None) -> Tensor:
    """Returns a site's stream or output with its items first and its tokens second.

    Args:
        x: (L, B, D) of the form "sequence first", (B, T, H, W, D) of "grid"; others stay as they
            are.
        form: see `Site`.
    """
    if form == "sequence first":
        return x.transpose(0, 1)
    return x.flatten(1, -2) if form == "grid" else x


def as_given(tokens: Tensor, x: Tensor, form: Form | None) -> Tensor:
    """Returns changed tokens (B, L, D) in the form that x had before `as_tokens`."""
    if form == "sequence first":
        return tokens.transpose(0, 1)
    return tokens.view(x.shape) if form == "grid" else tokens
