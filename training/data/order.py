"""Which image is in which batch: global batches of one size, in an order that needs no state."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dmp_common import PatchError
from training.data import draws
from training.data.batch import Position

Numbers = npt.NDArray[np.int64]
Plan = Sequence[Numbers]


class Order:
    """The order of items in each epoch.

    Args:
        buckets: a bucket for every item; items of one batch are of one bucket.
        seed: of the order.
        shuffle: without it the order is that of the items, for validation.
        batches: images of one process and step, for the buckets of data sets that set it by
            themselves.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        seed: int,
        shuffle: bool,
        batches: Mapping[Any, int] = MappingProxyType({}),
    ) -> None:
        numbers: dict[Hashable, int] = {}
        which = np.array([numbers.setdefault(b, len(numbers)) for b in buckets], dtype=np.int64)
        self._members = [np.flatnonzero(which == n) for n in range(len(numbers))]
        self._own = [batches.get(bucket) for bucket in numbers]
        self._seed, self._shuffle = seed, shuffle
        self._plans: dict[tuple[int, int, int], Plan] = {}

    def plan(self, epoch: int, global_batch: int, world: int = 1) -> Plan:
        """Item numbers of an epoch: an array for each batch.

        The last batch of a bucket is filled up from the bucket's start, whose images are others
        in each epoch: none is dropped, and over epochs none is preferred.

        Args:
            epoch: of the plan.
            global_batch: images of a batch, for buckets without a batch size of their own.
            world: processes; the other batches have their own size times this.
        """
        known = self._plans.get((epoch, global_batch, world))
        if known is not None:
            return known
        blocks: list[Numbers] = []
        for number, members in enumerate(self._members):
            if self._shuffle:
                chosen = draws.permutation(len(members), self._seed, epoch, "bucket", number)
                members = members[chosen]
            size = self._size(number, global_batch, world)
            blocks.append(np.resize(members, (-(-len(members) // size), size)))
        plan: Plan = _joined(blocks)
        if self._shuffle:
            chosen = draws.permutation(len(plan), self._seed, epoch, "batches")
            plan = plan[chosen] if isinstance(plan, np.ndarray) else [plan[n] for n in chosen]
        kept = dict(list(self._plans.items())[:1])
        self._plans = {(epoch, global_batch, world): plan, **kept}
        return plan

    def fills(self, global_batch: int, world: int = 1) -> Sequence[npt.NDArray[np.bool_]]:
        """Places of an unshuffled plan that repeat an image to fill up a batch."""
        blocks = []
        for number, members in enumerate(self._members):
            size = self._size(number, global_batch, world)
            count = -(-len(members) // size)
            places = np.arange(count * size) >= len(members)
            blocks.append(places.reshape(count, size))
        rows: Sequence[npt.NDArray[np.bool_]] = _joined(blocks)
        return rows

    def _size(self, number: int, global_batch: int, world: int) -> int:
        own = self._own[number]
        return global_batch if own is None else own * world

    def positions(self, start: Position, global_batch: int, world: int = 1) -> Iterator[Position]:
        """Positions from `start` on, without end; a position past its epoch begins the next."""
        count = len(self.plan(start.epoch, global_batch, world))
        epoch, batch = start.epoch + start.batch // count, start.batch % count
        while True:
            yield Position(epoch, batch)
            epoch, batch = (epoch, batch + 1) if batch + 1 < count else (epoch + 1, 0)

    def after(self, position: Position, global_batch: int, world: int = 1) -> Position:
        """The position after one batch."""
        last = position.batch + 1 >= len(self.plan(position.epoch, global_batch, world))
        return Position(position.epoch + 1, 0) if last else position._replace(
            batch=position.batch + 1
        )  # fmt: skip


def _joined(blocks: Sequence[npt.NDArray[Any]]) -> Any:
    """The rows of all blocks: an array where all are of one length, which takes less memory."""
    if len({block.shape[1] for block in blocks}) == 1:
        return np.concatenate(blocks)
    return [row for block in blocks for row in block]


def share(global_batch: int, rank: int, world: int) -> slice:
    """A rank's places in a global batch.

    Raises:
        PatchError: the batch does not divide by the number of processes.
    """
    if global_batch < 1 or world < 1 or not 0 <= rank < world or global_batch % world:
        raise PatchError(
            f"expected a global batch that {world} processes share equally, found {global_batch} "
            f"(rank {rank}): change --train_batch_size or the number of processes."
        )
    each = global_batch // world
    return slice(rank * each, (rank + 1) * each)
