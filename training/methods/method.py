"""A method of training: trainable values on a base, and the file they are written to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.options.config import TrainConfig


class Method(nn.Module, ABC):
    """The trainable values that one method adds to a base.

    Args:
        frozen: the base; `remove` gives it back as it was (`full`, which trains it, does not).
    """

    ending = ".safetensors"  # the ending of the method's file; "" for a folder

    def __init__(self, frozen: FrozenBase) -> None:
        super().__init__()
        self._frozen = (frozen,)  # a tuple: its modules are not this method's

    @property
    def frozen(self) -> FrozenBase:
        """The base that the method is on."""
        return self._frozen[0]

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained values by name."""

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        return [{"params": list(self.trainable().values()), "lr": config.learning_rate}]

    @property
    def changes_nothing(self) -> bool:
        """Whether the model is certainly the base still, as with prompts that are all zero."""
        return False

    def draw(self, names: Sequence[tuple[object, ...]]) -> None:
        """Draws what the method needs at random in the next forward pass of training.

        Args:
            names: what the draws of each sample depend on.
        """
        return

    def silenced(self) -> AbstractContextManager[object]:
        """Returns a context in which the model is exactly the base, for an exact call of it.

        Raises:
            PatchError: the method trains the weights of the base, which is the base no more.
        """
        raise PatchError(
            f"expected a method that can be switched off, found {type(self).__name__}: give the "
            "exact call a model of its own."
        )

    def at(self, strengths: Tensor | None) -> AbstractContextManager[object]:
        """Returns a context in which each item of a batch is predicted at a strength of its own.

        Args:
            strengths: (B,); None for 1 everywhere.

        Raises:
            PatchError: strengths for a method that has one strength for all items.
        """
        if strengths is None:
            return nullcontext()
        raise PatchError(
            "expected --method dmp or prompt where each item has a strength of its own, found "
            f"{type(self).__name__}: give --teacher_guidance_scale one number."
        )

    def scale(self, factor: float) -> None:
        """Multiplies what the method adds to the base, so that 1 is then the strength `factor`.

        Raises:
            PatchError: the method trains the weights of the base themselves.
        """
        raise PatchError(
            "expected --method dmp, prompt or lora where a strength is folded into the trained "
            f"values, found {type(self).__name__}: leave out --choose_strength."
        )

    def own_losses(self, given: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The losses of the method besides the prediction's, by name.

        Args:
            given: the conditions of the batch, tensors (B, ...) by name.
            step: the micro-step, which seeds the draws.
        """
        return {}

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes the file (or folder) of this method, atomically."""

    def saved_parameters(self) -> int:
        """The number of values in the method's file."""
        return sum(p.numel() for p in self.trainable().values())

    @abstractmethod
    def remove(self) -> None:
        """Takes the method off the base."""
