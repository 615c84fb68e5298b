"""Random draws of the training itself, which depend on (seed, micro-step, position) alone.

So a resumed run draws what the uninterrupted one would have drawn, and two processes draw what
one draws for the same global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.draws import generator


@dataclass(frozen=True)
class Draws:
    """What B samples need.

    Args:
        noise: (B, C, H, W), standard normal.
        latent: (B, C, H, W), standard normal, for the VAE's distribution.
        u, z: (B,), uniform in [0, 1) and standard normal, for timesteps.
    """

    noise: Tensor
    latent: Tensor
    u: Tensor
    z: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same on a device."""
        return Draws(*(x.to(device) for x in (self.noise, self.latent, self.u, self.z)))


def draw(
    names: Sequence[tuple[object, ...]], shape: tuple[int, int, int], offset: float = 0.0
) -> Draws:
    """Draws for B samples.

    Args:
        names: of each sample, what its draws depend on.
        shape: (C, H, W).
        offset: share of the noise that is constant over the picture (Guttenberg 2023).
    """
    rows: list[tuple[Tensor, ...]] = []
    for name in names:
        source = generator(*name)
        u, z = torch.rand((), generator=source), torch.randn((), generator=source)
        noise = torch.randn(shape, generator=source)
        if offset:
            noise = noise + offset * torch.randn(shape[0], 1, 1, generator=source)
        rows.append((noise, torch.randn(shape, generator=source), u, z))
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))
