"""A field: what one site's prompts add at some timesteps, ready for inputs of one shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmp_common.errors import PatchError


class Field(NamedTuple):
    """What is added, in the type, place and layout of a site's input.

    Args:
        values: the field (T, D, H, W) or (T, H*W, D); or, where `weights` are given, the prompts
            (N, D) themselves, so that nothing need be built and remembered.
        weights: None, or (T, N, 1).
        start, length: the part of axis 1 of the input that the field belongs to, `start` for all
            items or for each; length None for all of it.
    """

    values: Tensor
    weights: Tensor | None = None
    start: int | tuple[int, ...] = 0
    length: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes this field alone keeps alive; prompts live in the patch."""
        kept = self.values if self.weights is None else self.weights
        return kept.numel() * kept.element_size()

    def added(self, x: Tensor, strength: float | Tensor, rows: Tensor | None) -> Tensor:
        """x + strength * field, out of place and in the memory layout of x.

        Another layout would choose other kernels and change results by rounding.

        Args:
            x: the site's input (B, ...).
            strength: of all items, or of each (B,).
            rows: for each item its index in T (B,); None where T is 1 or B.
        """
        scaled = self.values if self.weights is None else self.weights
        if rows is not None:
            scaled = scaled[rows]
        if scaled.shape[0] not in (1, x.shape[0]):
            raise PatchError(
                f"expected a batch of {scaled.shape[0]} items, as many as timesteps, found "
                f"{x.shape[0]}: give one timestep for each item."
            )
        if isinstance(strength, Tensor):
            factors = strength.to(scaled.device, scaled.dtype)
            scaled, strength = scaled * factors.reshape(-1, *[1] * (scaled.dim() - 1)), 1.0
        if self.length is None:
            if self.weights is None:
                out = torch.add(x, scaled, alpha=strength)
            else:
                out = torch.addcmul(x, self.values, scaled, value=strength)
            if out.stride() == x.stride():
                return out
        out = x.clone()
        addend = scaled if self.weights is None else scaled * self.values
        if isinstance(self.start, tuple):
            assert self.length is not None
            for item, start in enumerate(self.start):
                own = addend[item if len(addend) > 1 else 0]
                out[item].narrow(0, start, self.length).add_(own, alpha=strength)
            return out
        part = out if self.length is None else out.narrow(1, self.start, self.length)
        part.add_(addend, alpha=strength)
        return out
