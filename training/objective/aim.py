"""What a batch asks of the student: a prediction for noisy data, and what it should be."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from training.base.families.family import Given
from training.objective.inputs import Inputs
from training.objective.noising import Process


@dataclass(frozen=True)
class Aim:
    """One batch of predictions and their targets, on the student's device.

    Args:
        noisy: the model's input (B, C, H, W); of videos (B, C, T, H, W), and so are the others.
        t: (B,), on the scale 0..1000.
        given: the conditions of the samples, tensors (B, ...) by name.
        target: what the prediction should be (B, C, H, W), float32.
        keys: names of the samples.
        weights: (B,) factors of the losses; None if all are 1.
        masks: (B, 1, H, W), how much each place counts; None if all count alike.
        clean: (B, C, H, W), for the variational term of a learned variance; None without it.
        strengths: (B,), at which strength each sample is predicted; None where all are 1.
    """

    noisy: Tensor
    t: Tensor
    given: Given
    target: Tensor
    keys: list[str]
    weights: Tensor | None = None
    masks: Tensor | None = None
    clean: Tensor | None = None
    strengths: Tensor | None = None

    def to(self, device: torch.device) -> Aim:
        """The same aim on a device."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        given = {name: value.to(device) for name, value in self.given.items()}
        changes: dict[str, Any] = {**moved, "given": given}
        return replace(self, **changes)


def noise_aim(inputs: Inputs, process: Process) -> Aim:
    """The aim of the paper's objective: the noise (or v, or the flow) of the data themselves."""
    draws, clean = inputs.draws, inputs.clean
    t = drawn_times(inputs, process)
    entering = draws.noise if draws.entering is None else draws.entering
    return Aim(
        noisy=process.noisy(clean, entering, t),
        t=t,
        given=inputs.given,
        target=process.target(clean, draws.noise, t).float(),
        keys=inputs.keys,
        weights=inputs.weights,
        masks=inputs.masks,
        clean=clean,
    )


def drawn_times(inputs: Inputs, process: Process) -> Tensor:
    """The timesteps (B,) that the draws of a batch stand for."""
    return process.times(inputs.draws.u, inputs.draws.z, inputs.clean.shape[2:])
