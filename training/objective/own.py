"""Objectives on samples of the base itself: away from them, alone or beside the data.

A patch that is trained at strength -1 on own samples learns the negative of what it would learn
at strength 1, value by value: the optimisers are odd in the gradient. So nothing has to be negated
when the file is written, and strength 1 leads away from what the base draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.objectives import two_sided_strengths
from training.base.encoders import FrozenEncoders
from training.data.batch import Batch
from training.data.draws import below
from training.objective.aim import Aim, noise_aim
from training.objective.inputs import Inputs, encode
from training.objective.noise import Names
from training.objective.noising import Process
from training.objective.objectives import DataObjective
from training.options.config import TrainConfig

CLEAN = "clean"  # the name of the samples in a file; conditions have GIVEN before theirs
GIVEN = "given."


class OwnSamples:
    """Samples of the base on disk, with the conditions that they were drawn for.

    They are read row by row: conditions of large text encoders would not fit into memory.

    Args:
        files: each has samples of one size, and tensors of one length.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    @cached_property
    def _places(self) -> dict[tuple[int, ...], list[tuple[Path, int]]]:
        """For each size of samples the file and the row of every one."""
        places: dict[tuple[int, ...], list[tuple[Path, int]]] = {}
        for path in self.files:
            with safe_open(path, "pt") as file:
                count, *size = file.get_slice(CLEAN).get_shape()
            places.setdefault(tuple(size), []).extend((path, row) for row in range(count))
        return places

    def __len__(self) -> int:
        """The number of samples."""
        return sum(len(rows) for rows in self._places.values())

    def choose(self, names: Names, like: Inputs) -> Inputs:
        """Samples in the place of data, with the draws of these; each is chosen by its name.

        Args:
            names: what the choice of each sample depends on.
            like: the data (B, C, H, W).

        Raises:
            PatchError: no sample has the size of these data.
        """
        size = tuple(like.clean.shape[1:])
        places = self._places.get(size)
        if not places:
            raise PatchError(
                f"expected own samples of {size[-2]} x {size[-1]}, the size of a batch of data, "
                f"found {', '.join(f'{h} x {w}' for *_, h, w in self._places)}: raise "
                "--own_samples."
            )
        chosen = [places[below(len(places), *name, "own sample")] for name in names]
        rows = [_read(path, row) for path, row in chosen]
        found = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        device = like.clean.device
        given = {
            key.removeprefix(GIVEN): value.to(device)
            for key, value in found.items()
            if key.startswith(GIVEN)
        }
        return replace(
            like,
            clean=found[CLEAN].to(device, like.clean.dtype),
            given=given,
            weights=None,
            keys=[f"own sample {path.stem} {row}" for path, row in chosen],
            masks=None,
        )


def _read(path: Path, row: int) -> dict[str, Tensor]:
    """One sample and its conditions, tensors (1, ...) by name."""
    with safe_open(path, "pt") as file:
        return {key: file.get_slice(key)[row : row + 1] for key in file.keys()}  # noqa: SIM118


class OwnObjective(DataObjective):
    """Away from the base's own samples: their noise is predicted at strength -1.

    Args:
        encoders, process, config, device: see `DataObjective`.
        samples: of the base; None uses the data in their place, for a dry run.

    Source: Alemohammad et al. 2025, "Neon: Negative Extrapolation from Self-Training".
    """

    def __init__(
        self,
        encoders: FrozenEncoders,
        process: Process,
        config: TrainConfig,
        device: torch.device,
        samples: OwnSamples | None,
    ) -> None:
        super().__init__(encoders, process, config, device)
        self.samples = samples

    def aim(self, batch: Batch, names: Names) -> Aim:
        """See `DataObjective.aim`; of the data only the sizes are used."""
        inputs = encode(batch, self.encoders, self.config, names, self.device)
        own = inputs if self.samples is None else self.samples.choose(names, inputs)
        strengths = torch.full((len(names),), -1.0, device=self.device)
        return replace(noise_aim(own, self.process), strengths=strengths)


class TwoSided(OwnObjective):
    """Towards the data and away from own samples: every second sample of a batch is an own one.

    Args:
        encoders, process, config, device, samples: see `OwnObjective`.
    """

    def aim(self, batch: Batch, names: Names) -> Aim:
        """See `DataObjective.aim`. Which samples are own ones depends on the micro-step and on the
        place in the global batch, so that two processes train on what one would."""
        data = encode(batch, self.encoders, self.config, names, self.device)
        own = data if self.samples is None else self.samples.choose(names, data)
        sides = torch.tensor([_side(name) for name in names], device=self.device)
        mixed = replace(
            data,
            clean=_by_side(sides, data.clean, own.clean),
            given={n: _by_side(sides, v, own.given[n].to(v)) for n, v in data.given.items()},
            weights=None if data.weights is None else torch.where(sides == 1, 1.0, data.weights),
            keys=[(data, own)[side].keys[row] for row, side in enumerate(sides.tolist())],
            masks=None
            if data.masks is None
            else _by_side(sides, data.masks, torch.ones_like(data.masks)),
        )
        strengths = two_sided_strengths(1, 1, self.device)[sides]
        return replace(noise_aim(mixed, self.process), strengths=strengths)


def _side(name: tuple[object, ...]) -> int:
    """0 for data and 1 for an own sample, by the micro-step and the place in the global batch."""
    return sum(part for part in name[-2:] if isinstance(part, int)) % 2


def _by_side(sides: Tensor, data: Tensor, own: Tensor) -> Tensor:
    """Rows (B, ...) of the data where the side is 0, and of own samples where it is 1."""
    return torch.where(sides.reshape(-1, *[1] * (data.ndim - 1)) == 1, own, data)
