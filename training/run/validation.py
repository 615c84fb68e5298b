"""Validation: the denoising loss by timestep, of base and trained model on equal noise."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from training.base.encoders import FrozenEncoders
from training.data.batch import Data, Position
from training.objective.inputs import Inputs, encode
from training.objective.losses import losses_by_bin
from training.objective.noising import Process
from training.objective.student import Student
from training.options.config import TrainConfig


class Validation:
    """A fixed set of images, noises and timesteps; nothing of it depends on --seed.

    Images are encoded once, and this rank's share of them is kept on the CPU.

    Args:
        data: the validation split.
        encoders: of the base.
        process: of the base.
        config: bins, draws, number of images.
        accelerator: of the run.
    """

    def __init__(
        self,
        data: Data,
        encoders: FrozenEncoders,
        process: Process,
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        self.process, self.config, self.accelerator = process, config, accelerator
        world = accelerator.num_processes
        per_step = config.train_batch_size * world
        self.batches: list[Inputs] = []
        seen = 0
        for batch in data.batches(
            global_batch=per_step,
            rank=accelerator.process_index,
            world=world,
            start=Position(0, 0),
            workers=config.max_data_loader_n_workers,
        ):
            names = [("validation", key) for key in batch.keys]
            inputs = encode(batch, encoders, config, names, accelerator.device)
            self.batches.append(inputs.to(torch.device("cpu")))
            seen += per_step
            enough = config.max_validation_images
            if batch.next.epoch > 0 or (enough is not None and seen >= enough):
                break

    def __call__(self, student: Student) -> list[float]:
        """Mean squared error in each bin of timesteps, least noisy first."""
        config, device = self.config, self.accelerator.device
        bins, draws = config.validation_bins, config.validation_draws
        sums = torch.zeros(bins + 1, dtype=torch.float64)  # of the errors; of the weights
        with self.accelerator.autocast():
            for kept in self.batches:
                losses = losses_by_bin(
                    student, self.process, kept.to(device), bins=bins, draws=draws,
                    name="validation",
                )  # fmt: skip
                weights = torch.ones(len(losses)) if kept.weights is None else kept.weights
                sums[:-1] += weights.double() @ losses
                sums[-1] += weights.double().sum()
        sums = self.accelerator.reduce(sums.float().to(device), reduction="sum").double().cpu()
        return (sums[:-1] / sums[-1].clamp(min=1e-12)).tolist()
