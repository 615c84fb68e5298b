"""The averaged values of what is trained, which are validated, shown and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from diffusers.training_utils import EMAModel
from torch import Tensor

from training.run.optimisers import is_schedule_free


class Average:
    """An exponential moving average, if there is one; else the values as they are.

    The decay grows from 0 as (1 + n) / (10 + n), so that the beginning is soon forgotten.

    Args:
        parameters: what is trained.
        decay: 0 for none.
        optimiser: schedule-free ones hold averaged values themselves.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, optimiser: Any) -> None:
        self.parameters = parameters
        self.optimiser = getattr(optimiser, "optimizer", optimiser)
        self.free = is_schedule_free(optimiser)
        self.ema = EMAModel(parameters, decay=decay) if decay and not self.free else None

    def update(self) -> None:
        """After an optimiser step."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """For the state of a run."""
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        if self.ema is not None:
            self.ema.load_state_dict(state)
            self.ema.to(self.parameters[0].device)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The trained module with its averaged values, and its own again afterwards."""
        kept: list[Tensor] = []
        if self.free:
            # Its way back computes the values from the averaged ones, which rounds them.
            kept = [parameter.detach().clone() for parameter in self.parameters]
            self.optimiser.eval()
        elif self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.free:
                self.optimiser.train()
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.data.copy_(value)
            elif self.ema is not None:
                self.ema.restore(self.parameters)
