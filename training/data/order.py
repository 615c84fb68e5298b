"""Which image is in which batch: global batches of one size, in an order that needs no state."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dmp_common import PatchError
from training.data import draws
from training.data.batch import Position

Plan = npt.NDArray[np.int64]


class Order:
    """The order of items in each epoch.

    Args:
        buckets: a bucket for every item; items of one batch are of one bucket.
        seed: of the order.
        shuffle: without it the order is that of the items, for validation.
    """

    def __init__(self, buckets: Sequence[Hashable], seed: int, shuffle: bool) -> None:
        numbers: dict[Hashable, int] = {}
        which = np.array([numbers.setdefault(b, len(numbers)) for b in buckets], dtype=np.int64)
        self._members = [np.flatnonzero(which == n) for n in range(len(numbers))]
        self._seed, self._shuffle = seed, shuffle
        self._plans: dict[tuple[int, int], Plan] = {}

    def plan(self, epoch: int, global_batch: int) -> Plan:
        """Item numbers of an epoch, (batches, global_batch).

        The last batch of a bucket is filled up from the bucket's start, whose images are others
        in each epoch: none is dropped, and over epochs none is preferred.
        """
        known = self._plans.get((epoch, global_batch))
        if known is not None:
            return known
        rows = []
        for number, members in enumerate(self._members):
            if self._shuffle:
                chosen = draws.permutation(len(members), self._seed, epoch, "bucket", number)
                members = members[chosen]
            count = -(-len(members) // global_batch)
            rows.append(np.resize(members, (count, global_batch)))
        plan = np.concatenate(rows)
        if self._shuffle:
            plan = plan[draws.permutation(len(plan), self._seed, epoch, "batches")]
        self._plans = {(epoch, global_batch): plan, **dict(list(self._plans.items())[:1])}
        return plan

    def fills(self, global_batch: int) -> npt.NDArray[np.bool_]:
        """Places of an unshuffled plan that repeat an image to fill up a batch."""
        rows = []
        for members in self._members:
            count = -(-len(members) // global_batch)
            places = np.arange(count * global_batch) >= len(members)
            rows.append(places.reshape(count, global_batch))
        return np.concatenate(rows)

    def positions(self, start: Position, global_batch: int) -> Iterator[Position]:
        """Positions from `start` on, without end; a position past its epoch begins the next."""
        count = len(self.plan(start.epoch, global_batch))
        epoch, batch = start.epoch + start.batch // count, start.batch % count
        while True:
            yield Position(epoch, batch)
            epoch, batch = (epoch, batch + 1) if batch + 1 < count else (epoch + 1, 0)

    def after(self, position: Position, global_batch: int) -> Position:
        """The position after one batch."""
        last = position.batch + 1 >= len(self.plan(position.epoch, global_batch))
        return Position(position.epoch + 1, 0) if last else position._replace(
            batch=position.batch + 1
        )  # fmt: skip


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
