"""Validation: the denoising loss by noise level, of base and trained model on equal noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.base.families.family import Given
from training.data.batch import Data, Position
from training.objective.inputs import Inputs, encode
from training.objective.losses import Target, ask_all, gaps_of_sides, losses_by_bin
from training.objective.student import Student
from training.objective.teacher import KeptTeacher
from training.options.config import TrainConfig
from training.run.parts import Parts

# The share of the images that is held out where nobody chose one, and between which numbers.
SHARE, FEWEST, MOST = 0.05, 8, 64
_FEWEST_IMAGES = 40  # with fewer, holding out images costs more than a validation tells
_WORK = 0.05  # of the training's forward and backward passes, at most, goes into validations


def automatic_share(images: int) -> float:
    """The share of the images to hold out where --validation_split does not say; 0 for none.

    Args:
        images: how many there are.
    """
    if images < _FEWEST_IMAGES:
        return 0.0
    return min(max(SHARE * images, FEWEST), MOST) / images


def automatic_steps(config: TrainConfig, images: int, per_step: int) -> int:
    """Steps between validations where no option says: at most ten, and little of the time.

    Args:
        images: that are validated on.
        per_step: images of an optimiser step.
    """
    one = images * config.validation_bins * config.validation_draws
    # A training step is a forward pass and a backward pass of about twice its cost.
    affordable = int(_WORK * 3 * config.max_train_steps * per_step / max(one, 1))
    return math.ceil(config.max_train_steps / min(max(affordable, 1), 10))


class Validation:
    """A fixed set of images, noises and timesteps; nothing of it depends on --seed.

    Images are encoded once, and this rank's share of them is kept on the CPU.

    Args:
        parts: of the run.
        data: the validation split.
        target: what predictions are compared with; None for the noise itself.
        config: bins, draws and number of images; None takes the run's.
    """

    def __init__(
        self,
        parts: Parts,
        data: Data,
        target: Target | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        config = parts.config if config is None else config
        self.target, self.nothing = target, parts.nothing
        self.config, self.accelerator, self.process = config, parts.accelerator, parts.process
        self.batches: list[Inputs] = []
        seen = 0
        for batch in data.batches(
            global_batch=parts.at_once,
            rank=parts.accelerator.process_index,
            world=parts.accelerator.num_processes,
            start=Position(0, 0),
            workers=config.max_data_loader_n_workers,
        ):
            names = [("validation", key) for key in batch.keys]
            inputs = encode(batch, parts.encoders, config, names, parts.device, held_out=True)
            self.batches.append(inputs.to(torch.device("cpu")))
            seen += parts.at_once
            enough = config.max_validation_images
            if batch.next.epoch > 0 or (enough is not None and seen >= enough):
                break

    def __len__(self) -> int:
        """Images of this process, each counted once."""
        return sum(
            len(kept.keys) if kept.weights is None else int((kept.weights > 0).sum())
            for kept in self.batches
        )

    def images(self, student: Student) -> Tensor:
        """Squared error of each image in each range of timesteps, of all processes.

        Returns:
            (images, bins) float64 on the CPU, least noisy first; the order of the images is the
            same for every model.
        """

        def measured(inputs: Inputs) -> Tensor:
            return losses_by_bin(student, self.process, inputs, target=self.target, **self._how)

        return self._of_all(measured)

    def sides(self, student: Student) -> Tensor | None:
        """Squared gaps of the conditional and unconditional predictions and of their difference.

        Returns:
            (3, images, bins), see `gaps_of_sides`; None where the exact call is guided, or there is
            none, or the base has no conditions.
        """
        target, nothing = self.target, self.nothing
        if target is None or nothing is None or self.config.guidance_range is not None:
            return None

        def measured(inputs: Inputs) -> Tensor:
            sides = gaps_of_sides(
                student, self.process, inputs, self._moved(nothing), target, **self._how
            )
            return sides.movedim(0, 1).flatten(1)  # (B, 3 bins)

        found = self._of_all(measured)
        return found.unflatten(1, (-1, self.config.validation_bins)).movedim(1, 0)

    def ask(self) -> None:
        """Asks the exact call for all its predictions, after which it is not needed any more."""
        target = self.target
        if not isinstance(target, KeptTeacher):
            return
        nothing = None if self.config.guidance_range is not None else self.nothing
        for kept in self.batches:
            inputs = kept.to(self.accelerator.device)
            ask_all(
                self.process, inputs, target,
                None if nothing is None else self._moved(nothing), **self._how,
            )  # fmt: skip
        target.release()

    @property
    def _how(self) -> dict[str, Any]:
        config = self.config
        return {
            "bins": config.validation_bins, "draws": config.validation_draws, "name": "validation"
        }  # fmt: skip

    def _moved(self, given: Given) -> Given:
        return {name: value.to(self.accelerator.device) for name, value in given.items()}

    def _of_all(self, measured: Callable[[Inputs], Tensor]) -> Tensor:
        """Rows (images, ...) of every image of all processes, float64 on the CPU."""
        device, rows = self.accelerator.device, []
        with self.accelerator.autocast():
            for kept in self.batches:
                losses = measured(kept.to(device))
                weights = torch.ones(len(losses)) if kept.weights is None else kept.weights
                rows.append(torch.cat([losses, weights.double()[:, None]], dim=1))
        # Apple's GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        found: Tensor = self.accelerator.gather(torch.cat(rows).to(device, dtype))
        found = found.double().cpu()
        return found[found[:, -1] > 0, :-1]
