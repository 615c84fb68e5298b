"""Validation: the denoising loss by timestep, of base and trained model on equal noise."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from training.config import TrainConfig
from training.data.batch import Data, Position
from training.draws import Draws, draw
from training.encoders import FrozenEncoders
from training.inputs import Inputs, encode
from training.objective import Student
from training.process import Process


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
            self.batches.append(_moved(inputs, torch.device("cpu")))
            seen += per_step
            enough = config.max_validation_images
            if batch.next.epoch > 0 or (enough is not None and seen >= enough):
                break

    def __call__(self, student: Student) -> list[float]:
        """Mean squared error in each bin of timesteps, least noisy first."""
        config, device = self.config, self.accelerator.device
        sums = torch.zeros(config.validation_bins, 2, dtype=torch.float64)
        with torch.no_grad(), self.accelerator.autocast():
            for kept in self.batches:
                inputs = _moved(kept, device)
                for number in range(config.validation_bins):
                    for repeat in range(config.validation_draws):
                        sums[number] += self._error(student, inputs, number, repeat)
        sums = self.accelerator.reduce(sums.float().to(device), reduction="sum").double().cpu()
        return (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist()

    def _error(self, student: Student, inputs: Inputs, number: int, repeat: int) -> Tensor:
        """Sum of the errors of a batch, and of the weights of its images, (2,) on the CPU."""
        names = [("validation", key, number, repeat) for key in inputs.keys]
        draws: Draws = draw(names, tuple(inputs.clean.shape[1:])).to(inputs.clean.device)
        t = self.process.bin(number, self.config.validation_bins, draws.u)
        losses = student.denoising(inputs.clean, draws.noise, t, inputs.given)["denoising"]
        weights = torch.ones_like(losses) if inputs.weights is None else inputs.weights
        return torch.stack([(losses * weights).sum(), weights.sum()]).double().cpu()


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return replace(
        inputs,
        clean=inputs.clean.to(device),
        given={name: value.to(device) for name, value in inputs.given.items()},
        weights=None if inputs.weights is None else inputs.weights.to(device),
    )
