"""A gate whose logits are noisy in the forward pass of training, as in the official code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dmp_common import Patch
from dmp_common.compat import AUTOCAST
from dmp_common.patch.balancing import GateNoise
from dmp_common.patch.gate import Gate
from training.data.draws import generator


class NoisyGate(Gate):
    """The gate of a patch in training: its logits are G([e ; i]) + noise * std(e).

    The standard deviation is learned; it is that of the load loss's noise. Nothing is added in
    evaluation mode, and the file of the patch knows neither the noise nor its size.

    Args:
        patch: whose gate this one replaces, with the same values.
        size: the standard deviation for a time embedding.

    Source: Shazeer et al. 2017, eq. 4; sangminwoo/DMP, models/DiT/models.py.
    """

    def __init__(self, patch: Patch, size: GateNoise) -> None:
        super().__init__(patch.variant, patch.base.embedding)
        self.load_state_dict(patch.gate.state_dict())
        self._size = (size,)  # a tuple: its weight is not one of the patch
        self._noise: Tensor | None = None

    def draw(self, names: Sequence[tuple[object, ...]]) -> None:
        """Draws the noise of the next forward pass, for each sample by its own name."""
        shape = (len(self.variant.sites), self.variant.outputs)
        drawn = [torch.randn(shape, generator=generator(*name, "gate noise")) for name in names]
        device = next(self.parameters()).device
        self._noise = torch.stack(drawn).to(device, non_blocking=True)  # (B, S, N)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Adds no noise inside, as the balancing losses need it: they have noise of their own."""
        kept, self._noise = self._noise, None
        try:
            yield
        finally:
            self._noise = kept

    def logits(self, e: Tensor) -> Tensor:
        """Computes the logits (B, S, N), with the drawn noise in training mode."""
        logits = super().logits(e)
        if self._noise is None or not self.training:
            return logits
        if e.device.type not in AUTOCAST:
            return logits + self._noise * self._size[0](e)
        with torch.autocast(e.device.type, enabled=False):
            return logits + self._noise * self._size[0](e)  # (B, S, N) * (B, 1, N)
