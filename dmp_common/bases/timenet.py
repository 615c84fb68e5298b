"""Computes a time embedding from the tensors of a file, where it is not the usual two layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Returns the tensor of a file that has one of these names below the module of the time embedding.
Read = Callable[..., Tensor]


@dataclass(frozen=True)
class TimeNet:
    """Describes the module that makes e of the sinusoid, as its tensors are in a file.

    Args:
        layers: names of one layer of it, one for each naming. A file that has its weight has the
            module.
        embed: returns e (T, E), float32, of (read, the sinusoid (T, F), depth).
        depth: layers of the module, where their number differs from model to model.
    """

    layers: tuple[str, ...]
    embed: Callable[[Read, Tensor, int], Tensor]
    depth: int = 0
