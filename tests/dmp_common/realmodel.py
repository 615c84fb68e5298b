"""A released model, and a call of it on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Real:
    """A released model: its configuration, and a call at its native size.

    Args:
        base: name of its base.
        build: makes the model.
        inputs: makes the arguments of a call with a batch of 2.
        latent: height and width.
        parameters: of the released model.
        text: tokens of a caption that share a sequence with the image tokens, in some blocks.
        unit_time: its timesteps run from 0 to 1.
        channels: of the latent as hosts hand it to a transformer.
    """

    base: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    latent: tuple[int, int]
    parameters: int | None = None
    text: int = 0
    unit_time: bool = False
    channels: int = 16

    def lengths(self, stride: int) -> tuple[int, int]:
        """Tokens of a sequence: of the image alone, and with the caption."""
        tokens = (self.latent[0] // stride) * (self.latent[1] // stride)
        return tokens, tokens + self.text
