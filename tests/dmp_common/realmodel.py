"""A released model, and a call of it on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


class Asked(dict):
    """A checkpoint that has every tensor it is asked for, each filled with its own number.

    diffusers' converters take tensors out by their original names; what they ask for is the list
    of original names, and the numbers show where each tensor goes.
    """

    def __init__(self, known: dict[str, Tensor], rows: Callable[[str], int]) -> None:
        super().__init__(known)
        self.rows = rows
        self.names: list[str] = []

    def pop(self, name: str) -> Tensor:
        super().pop(name, None)
        self.names.append(name)
        return torch.full((self.rows(name), 1), float(len(self.names) - 1))

    def origins(self, converted: dict[str, Tensor]) -> dict[str, str]:
        """From the names of what a converter has made of it to the original ones."""
        names = {}
        for key, value in converted.items():
            assert len(value.unique()) == 1
            names[key] = self.names[int(value.flatten()[0])]
        return names


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
        names: from its parameters' names in diffusers to the original ones; None for the families
            that `originalnames` knows.
        flat: the end of original names of tensors that are vectors in the original code.
        comfyui: module and name of ComfyUI's class, if `test_bases_hosts` does not know it.
        added: the tensors that the original file alone has, by name.
        call: calls that class with (the model, the latent, the timesteps (B,)).
        frames: of a video.
        prediction: what the released model predicts, as its scheduler states.
        dead: the ends of paths of layers in the last block whose output reaches no image token.
    """

    base: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    latent: tuple[int, int]
    parameters: int | None = None
    text: int = 0
    unit_time: bool = False
    channels: int = 16
    added: Callable[[], dict[str, tuple[int, ...]]] = dict
    names: Callable[[dict[str, Tensor]], dict[str, str]] | None = None
    flat: str | None = None
    comfyui: tuple[str, str] | None = None
    call: Callable[[nn.Module, Tensor, Tensor], object] | None = None
    frames: int = 1
    prediction: str = "flow"
    dead: tuple[str, ...] = ()

    def lengths(self, stride: int) -> tuple[int, int]:
        """Tokens of a sequence: of the image alone, and with the caption."""
        tokens = (self.latent[0] // stride) * (self.latent[1] // stride) * self.frames
        return tokens, tokens + self.text
