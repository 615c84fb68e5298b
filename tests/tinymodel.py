"""A family in small: a tiny model, the base that describes it, and inputs to run it on."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, Patch
from tests.randomness import randomise


@dataclass(frozen=True)
class Tiny:
    """A family in small.

    Args:
        base: describes the model; registered, so that patches for it can be made and saved.
        build: makes the model with random weights from a seed.
        inputs: keyword arguments of a call: (timesteps (B,), latent (H, W), dtype, seed).
        square_only: the architecture takes square latents only.
        text: tokens before the image tokens, of items by turns; None where these come last.
        time_name: the original name of a tensor of the time embedding, below its module; None
            where it is two layers whose names `test_timefile` knows.
        frames: of a video.
    """

    name: str
    base: Base
    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    square_only: bool = False
    text: tuple[int, ...] | None = None
    time_name: Callable[[str], str] | None = None
    frames: int = 1

    def starts(self, count: int, length: int, tokens: int) -> list[int]:
        """Where the image tokens of `count` items begin in sequences of a length."""
        if self.text is None:
            return [length - tokens] * count
        return [self.text[item % len(self.text)] for item in range(count)]

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in evaluation mode, without gradients for its own weights."""
        model = _copied(_built(self.build, seed), {})
        return model if dtype is torch.float32 else model.to(dtype)

    def run(
        self,
        model: nn.Module,
        timesteps: Tensor | list[float] = (10.0, 900.0),
        size: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float32,
        seed: int = 1,
    ) -> Tensor:
        """The model's output for inputs that depend on the seed only."""
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32)
        return self.call(model, self.inputs(timesteps, size, dtype, seed))

    def call(self, model: nn.Module, inputs: dict[str, Any], *positional: Any) -> Tensor:
        """The model's output for these arguments; lists of pictures as one batch."""
        out = model(*positional, **inputs, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def patch(self, seed: int | None = 0, std: float = 0.5, **variant: object) -> Patch:
        """A patch in evaluation mode, random unless the seed is None."""
        patch = Patch.create(self.base, **variant).eval()
        return patch if seed is None else randomise(patch, seed, std)


@functools.lru_cache(maxsize=32)
def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model to copy: making random weights takes longer than copying them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for name, parameter in model.named_parameters():
            # Also those that start at zero, or, in older releases of diffusers, as anything.
            if not parameter.any() or name.endswith("pad_token"):
                nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def _copied(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy that shares no parameter, buffer, module or container with the module.

    `copy.deepcopy` does this for every object that is reached, which takes as long as building.
    """
    if module in copies:
        return copies[module]
    copy = copies[module] = object.__new__(type(module))
    for name, value in vars(module).items():
        own = type(value) in (dict, OrderedDict, list, set)  # not a model's frozen configuration
        copy.__dict__[name] = value.copy() if own else value
    for name, parameter in module._parameters.items():
        if parameter is not None:
            values = parameter.detach().clone()
            copy._parameters[name] = nn.Parameter(values, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.clone()
    for name, inner in module._modules.items():
        copy._modules[name] = None if inner is None else _copied(inner, copies)
    return copy


def noise(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
