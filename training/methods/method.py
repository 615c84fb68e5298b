"""What a method of training is: trainable values on a base, and how their file is written."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from training.base.frozen import FrozenBase
from training.options.config import TrainConfig


class Method(nn.Module):
    """What one method adds to a base.

    Args:
        frozen: the base; `remove` gives it back as it was (except for `full`, which is the base).
    """

    ending = ".safetensors"  # of its file; "" for a folder

    def __init__(self, frozen: FrozenBase) -> None:
        super().__init__()
        self._frozen = (frozen,)  # a tuple: its modules are not this method's

    @property
    def frozen(self) -> FrozenBase:
        """The base."""
        return self._frozen[0]

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained values by name."""

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameters for the optimiser."""
        return [{"params": list(self.trainable().values()), "lr": config.learning_rate}]

    def own_losses(self, given: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Losses of the method besides that of the prediction, by name.

        Args:
            given: what each sample of the batch is told.
            step: the micro-step, which seeds the draws.
        """
        return {}

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes the file (or folder) of this method, atomically."""

    def saved_parameters(self) -> int:
        """Number of values in the file."""
        return sum(p.numel() for p in self.trainable().values())

    @abstractmethod
    def remove(self) -> None:
        """Takes the method off the base."""
