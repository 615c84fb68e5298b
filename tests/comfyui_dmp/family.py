"""A model class of ComfyUI in small, and its diffusers twin with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, Patch
from tests.randomness import randomise

TEXT = 5  # tokens of a caption


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(x: Tensor) -> Tensor:
    """A latent (B, 16, ..., H, W) as tokens (B, H W / 4, 64), as Flux and Qwen-Image take it."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    tiles = x.reshape(len(x), 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(len(x), rows * columns, 64)


def unpacked(out: Tensor, *size: int) -> Tensor:
    """Tokens as a latent (B, 16, *size)."""
    rows, columns = size[-2] // 2, size[-1] // 2
    tiles = out.reshape(len(out), rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(len(out), 16, *size)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where a class starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = parameter.dim() == 1 and name.endswith("weight")
            std = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ones)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Family:
    """One of ComfyUI's model classes in small.

    Args:
        base: describes it; registered.
        config: class in `comfy.supported_models`.
        unet: ComfyUI's configuration of the model.
        twin: makes the diffusers model.
        keys: from the names of the twin's weights to those of ComfyUI's.
        channels, context, pooled: sizes of the latent, the caption and its summary.
        size: of the latent, height and width.
        call: the arguments of the twin for (latent, timesteps 0..1000, caption, summary).
        unpack: the twin's output as a latent of a height and width.
        conds: what a call takes besides the caption and its summary, or makes of the number of
            items.
        building: a context in which ComfyUI's model is made.
        frames: what the latent has between its channels and its height.
    """

    name: str
    base: Base
    config: str
    unet: dict[str, Any]
    twin: Callable[[], nn.Module]
    keys: Callable[[], dict[str, Any]]
    call: Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]
    channels: int = 4
    context: int = 16
    pooled: int = 12
    size: tuple[int, int] = (16, 8)
    unpack: Callable[[Tensor, tuple[int, int]], Tensor] = field(default=lambda out, size: out)
    adm: bool = False
    frames: tuple[int, ...] = ()
    building: Callable[[], AbstractContextManager[object]] = nullcontext
    conds: dict[str, Any] = field(default_factory=dict)

    def diffusers(self, seed: int = 0) -> nn.Module:
        return randomised(self.twin(), seed)

    def comfy(self, seed: int = 0, dtype: torch.dtype = torch.float32, **unet: Any) -> Any:
        """A `ModelPatcher` around the real `BaseModel` with the twin's weights."""
        config = getattr(comfy.supported_models, self.config)({**self.unet, **unet})
        config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
        with self.building():
            model = config.get_model({}, device=torch.device("cpu"))
        weights = self.convert(self.diffusers(seed).state_dict())
        missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
        assert not unexpected
        own = {name for name in missing if not name.startswith(("pos_embed", "llm_adapter."))}
        assert own <= {"y_embedder.y_embedding"}
        model.diffusion_model.requires_grad_(False)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    def run(self, twin: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The output of the twin; lists of pictures as one batch."""
        out = twin(**arguments, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' weights under ComfyUI's names, by ComfyUI's own table."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for name, target in self.keys().items():
            if name not in weights:
                continue
            target = (target,) if isinstance(target, str) else target
            weight = target[2](weights[name]) if len(target) > 2 else weights[name]
            offset = target[1][1] if len(target) > 1 and target[1] is not None else 0
            parts.setdefault(target[0], []).append((offset, weight))
        return {
            name: torch.cat([w for _, w in sorted(pieces, key=lambda piece: piece[0])])
            for name, pieces in parts.items()
        }

    def patch(self, seed: int | None = 0, std: float = 0.5, **variant: Any) -> Patch:
        """A patch for it, random unless the seed is None."""
        patch = Patch.create(self.base, **variant).eval().requires_grad_(False)
        return patch if seed is None else randomise(patch, seed, std)

    def inputs(self, count: int, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        """Latents, captions and their summaries."""
        return (
            noise(1, count, self.channels, *self.frames, *(size or self.size)),
            noise(2, count, TEXT, self.context),
            noise(3, count, self.pooled),
        )
