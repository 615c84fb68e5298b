"""The objectives of the trainer: each makes aims of batches. The formulas are the core's."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from training.base.encoders import FrozenEncoders
from training.data.batch import Batch
from training.objective.aim import Aim, noise_aim
from training.objective.inputs import encode
from training.objective.noise import Names
from training.objective.noising import Process
from training.objective.teacher import Teacher
from training.options.config import TrainConfig


class DataObjective:
    """The paper's: predict the noise of the training data.

    Args:
        encoders: of the base.
        process: how data become noisy.
        config: of the run.
        device: of the student.
    """

    def __init__(
        self,
        encoders: FrozenEncoders,
        process: Process,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.encoders, self.process, self.config, self.device = encoders, process, config, device

    def aim(self, batch: Batch, names: Names) -> Aim:
        """The predictions and targets of a batch.

        Args:
            batch: of the data.
            names: what the random draws of each sample depend on.
        """
        inputs = encode(batch, self.encoders, self.config, names, self.device)
        return noise_aim(inputs, self.process)


class Distillation(DataObjective):
    """Predict, by the cheap call, what the exact call predicts at noised training data.

    Args:
        encoders, process, config, device: see `DataObjective`.
        teacher: the exact call.
        dtype: in which the noisy data will be kept, which is also what the teacher must see.
    """

    def __init__(
        self,
        encoders: FrozenEncoders,
        process: Process,
        config: TrainConfig,
        device: torch.device,
        teacher: Teacher,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(encoders, process, config, device)
        self.teacher, self.dtype = teacher, dtype

    def aim(self, batch: Batch, names: Names) -> Aim:
        """See `DataObjective.aim`. Where the scale of guidance is drawn, each sample's strength is
        the one that stands for its scale."""
        aim, scales = super().aim(batch, names), self.teacher.scales(names)
        noisy = aim.noisy.to(self.dtype).to(aim.noisy.dtype)
        target = self.teacher(noisy, aim.t, aim.given, scales)
        strengths = self.teacher.strengths(scales, self.device)
        return replace(aim, noisy=noisy, target=target, clean=None, strengths=strengths)


class Objective(Protocol):
    """Makes the aims of a run's batches."""

    def aim(self, batch: Batch, names: Names) -> Aim:
        """See `DataObjective.aim`."""
