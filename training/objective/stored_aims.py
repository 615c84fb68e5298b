"""Training on aims that are on disk: the data, and the objective that hands them on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dmp_common.patch.levels import level_means
from training.data.batch import Batch, Data, Position
from training.data.order import Order, share
from training.data.summary import BucketRow, DataSummary
from training.objective.aim import Aim
from training.objective.noise import Names
from training.objective.store import AimStore
from training.objective.student import Student


@dataclass(frozen=True)
class StoredBatch(Batch):
    """A batch whose aim was computed before.

    Args:
        aim: on the CPU.
    """

    aim: Aim | None = None


class StoredData(Data):
    """The aims of stores as a split of a data set: an epoch goes through all of them once.

    Args:
        stores: complete ones, such as those of all processes.
        about: the summary of the data that the aims were made from.
        seed: of the order.
        factor: pixels of a side over cells of the latent.
    """

    def __init__(
        self, stores: list[AimStore], about: DataSummary, seed: int, factor: int = 1
    ) -> None:
        self._stores, self._about, self._factor = stores, about, factor
        self._blocks = [
            (store, group, count) for store in stores for group, count in store.counts.items()
        ]
        self._starts = np.cumsum([0, *(count for _, _, count in self._blocks)])
        shapes = [group for _, group, count in self._blocks for _ in range(count)]
        self._order = Order(shapes, seed, shuffle=True)
        self.size = len(shapes)

    def summary(self) -> DataSummary:
        """What was drawn from, with the number of aims as its items."""
        rows: dict[tuple[int, int], int] = {}
        for _, group, count in self._blocks:
            *_, height, width = map(int, group.split("-")[0].split("x"))
            size = width * self._factor, height * self._factor
            rows[size] = rows.get(size, 0) + count
        buckets = [
            BucketRow(width, height, items, items) for (width, height), items in rows.items()
        ]
        note = f"{self.size:,} exact predictions on disk are trained on"
        return replace(
            self._about, items=self.size, buckets=buckets, notes=[*self._about.notes, note]
        )

    def fingerprint(self) -> str:
        """Of what the aims were made from."""
        facts = json.dumps([dict(store.facts) for store in self._stores], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def batches(
        self,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        start: Position = Position(),  # noqa: B008
        workers: int = 0,
        persistent: bool = False,
    ) -> Iterator[Batch]:
        """See `Data.batches`; the files are read as they are needed."""
        for position in self._order.positions(start, global_batch, world):
            row = self._order.plan(position.epoch, global_batch, world)[position.batch]
            numbers = np.asarray(row)[share(len(row), rank, world)]
            aim = self._read(numbers)
            after = self._order.after(position, global_batch, world)
            sizes = torch.zeros(len(numbers), 6, dtype=torch.int64)
            yield StoredBatch(aim.keys, sizes, after, aim=aim)

    @torch.no_grad()
    def gaps(
        self,
        student: Student,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[object]],
        bins: int,
        most: int = 4096,
    ) -> Tensor:
        """Mean squared gaps of a model to the exact predictions in ranges of timesteps (bins,).

        Args:
            student: the cheap call.
            device: of it.
            precision: the context of its forward passes.
            most: aims that are looked at.
        """
        size, times, errors = min(64, self.size or 1), list[Tensor](), list[Tensor]()
        for batch in self.batches(global_batch=size):
            assert isinstance(batch, StoredBatch)
            assert batch.aim is not None
            aim = batch.aim.to(device)
            with precision():
                found = student.squared_error(aim.noisy, aim.t, aim.given, aim.target)
            times.append(aim.t.cpu())
            errors.append(found.cpu())
            if len(times) * size >= most or batch.next.epoch > 0:
                break
        return level_means(torch.cat(times), torch.cat(errors), bins)

    def _read(self, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Aim:
        """Aims of one shape, which may be of several stores."""
        blocks = np.searchsorted(self._starts, numbers, side="right") - 1
        parts, places = [], []
        for block in np.unique(blocks):
            store, group, _ = self._blocks[block]
            mine = np.flatnonzero(blocks == block)
            parts.append(store.read(group, numbers[mine] - self._starts[block]))
            places.append(mine)
        if len(parts) == 1:
            return parts[0]
        return _joined(parts, np.argsort(np.concatenate(places)))


def _joined(parts: list[Aim], order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Aim:
    """Aims of several stores in the order of the batch."""
    first, rows = parts[0], torch.from_numpy(order)

    def whole(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)[rows]

    names = ("noisy", "t", "target", "weights", "masks", "strengths")
    given = {n: torch.cat([part.given[n] for part in parts])[rows] for n in first.given}
    keys = [key for part in parts for key in part.keys]
    tensors = {name: whole(name) for name in names}
    return Aim(**tensors, given=given, keys=[keys[n] for n in order])  # type: ignore[arg-type]


class StoredObjective:
    """Hands on the aims of a `StoredData`.

    Args:
        device: of the student.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def aim(self, batch: Batch, names: Names) -> Aim:
        """The aim of a batch on the student's device."""
        assert isinstance(batch, StoredBatch)
        assert batch.aim is not None
        return batch.aim.to(self.device)
