"""The exact call of a base, which --objective distill teaches to a cheap one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.bases.schedule import inside
from dmp_common.patch.objectives import guided, strength_of_guidance
from training.base.encoders import FrozenEncoders
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.data.draws import uniform
from training.objective.noise import Names
from training.options.config import TrainConfig


class Teacher:
    """Predictions F of the frozen base with its exact weights, guided where that is asked for.

    Args:
        exact: the base with its exact weights.
        config: scale and interval of the guidance.
        nothing: the unconditional side, tensors (1, ...) by name; None without guidance.
        silenced: returns a context in which what is trained does not act on the exact model; the
            default is for an exact model that nothing is on.
    """

    def __init__(
        self,
        exact: FrozenBase,
        config: TrainConfig,
        nothing: Given | None = None,
        silenced: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.exact, self.nothing, self.silenced = exact, nothing, silenced
        self.range = config.guidance_range
        self.interval = config.min_timestep, config.max_timestep
        if self.range is not None and nothing is None:
            raise ValueError("expected the unconditional side for a guided teacher, found none")

    def scales(self, names: Names) -> Tensor | None:
        """The guidance scale w of each sample (B,), drawn by its name; None without guidance."""
        if self.range is None:
            return None
        low, high = self.range
        drawn = [low + (high - low) * uniform(*name, "guidance") for name in names]
        return torch.tensor(drawn, dtype=torch.float32)

    def strengths(self, scales: Tensor | None, device: torch.device) -> Tensor | None:
        """The strengths (B,) that stand for scales of guidance; None where all are 1."""
        if scales is None or self.range is None or self.range[0] == self.range[1]:
            return None
        strengths = strength_of_guidance(scales, self.range[1])
        assert isinstance(strengths, Tensor)
        return strengths.to(device)

    @torch.no_grad()
    def __call__(
        self, noisy: Tensor, t: Tensor, given: Given, scales: Tensor | None = None
    ) -> Tensor:
        """F (B, C, H, W), float32, at noisy data (B, C, H, W), timesteps (B,) and conditions.

        Args:
            scales: of the guidance (B,); None is the greatest one for every sample. Outside of the
                interval of guidance they are 1.
        """
        with self.silenced():
            conditional = self._predict(noisy, t, given)
            if self.range is None or self.nothing is None:
                return conditional
            unconditional = self._predict(noisy, t, without(given, self.nothing))
        if scales is None:
            scales = torch.full((len(noisy),), self.range[1])
        scales = torch.where(inside(t, self.interval), scales.to(t.device), 1.0)
        return guided(conditional, unconditional, scales)

    def _predict(self, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        exact = self.exact
        output = exact.family.predict(exact.model, noisy.to(exact.dtype), t, given)
        return output[:, : noisy.shape[1]].float()


def without(given: Given, nothing: Given) -> dict[str, Tensor]:
    """The conditions of B samples with the unconditional ones in their place.

    Args:
        given: tensors (B, ...) by name; the size of the picture, which is no condition to leave
            out, stays.
        nothing: tensors (1, ...) by name.
    """
    count = len(next(iter(given.values())))
    return {
        **given,
        **{name: value.expand(count, *value.shape[1:]) for name, value in nothing.items()},
    }


def unconditional_side(
    frozen: FrozenBase, encoders: FrozenEncoders, config: TrainConfig, device: torch.device
) -> dict[str, Tensor] | None:
    """What stands for no condition, tensors (1, ...) by name: the null class or the empty caption.

    Returns:
        None for a base that has no conditions.
    """
    if frozen.conditioning == "none":
        return None
    if frozen.conditioning == "caption":
        told = encoders.told([config.negative_prompt])
        return {name: value.to(device) for name, value in told.items()}
    return {"labels": torch.tensor([int(frozen.null_label or 0)], device=device)}


def require_conditions(frozen: FrozenBase, config: TrainConfig) -> None:
    """Refuses guidance of a base that takes no conditions.

    Raises:
        PatchError: guidance is asked for, and there are none.
    """
    if config.guidance_range is not None and frozen.conditioning == "none":
        raise PatchError(
            "expected a base with classes or captions for --teacher_guidance_scale, found "
            f"{frozen.base.name} without: leave the option out."
        )


class KeptTeacher:
    """Predictions for held-out images, which are asked again and again: each is computed once.

    Args:
        teacher: is asked first.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher: Teacher | None = teacher
        self._kept: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """F (B, C, H, W) on the device of `noisy`.

        Args:
            name: of the batch, its timesteps and noise.
        """
        if name not in self._kept:
            assert self._teacher is not None
            self._kept[name] = self._teacher(noisy, t, given).cpu()
        return self._kept[name].to(noisy.device)

    def release(self) -> None:
        """Lets go of the exact model, once everything was asked."""
        self._teacher = None
