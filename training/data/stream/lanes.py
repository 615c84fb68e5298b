"""The order of a stream: lanes that know nothing of each other and agree all the same.

A global batch is served by a fixed number of lanes. The shards of all epochs, each epoch in an
order of its own, form one endless list, and lane l reads entries l, l + L, l + 2L ... of it. So a
process reads only the shards of its lanes, all lanes read equally much, and the batches do not
depend on how many processes there are. Where there are fewer shards than lanes, several lanes
share a shard: each takes every k-th of its samples.

Within a shard images are drawn from a small pool, which is empty at the shard's end. So the order
inside a shard depends on the shard alone, and to resume, whole shards are passed over by count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training.data import draws
from training.data.stream.shards import Counts, Raw, Shard, read_shard

MOST_LANES = 64  # open shards of a process, at most
T = TypeVar("T")


@dataclass(frozen=True)
class Visit:
    """One pass of a lane over a shard: the samples whose number is `part` modulo `parts`."""

    epoch: int
    shard: Shard
    part: int
    parts: int


def lane_count(global_batch: int) -> int:
    """Lanes of a global batch: its largest divisor that is not above `MOST_LANES`."""
    return next(n for n in range(min(global_batch, MOST_LANES), 0, -1) if global_batch % n == 0)


def visits(
    shards: Sequence[Shard], lane: int, lanes: int, seed: int, shuffle: bool
) -> Iterator[Visit]:
    """The endless list of what a lane reads."""
    parts = math.ceil(lanes / len(shards))
    count, known = len(shards) * parts, -1
    order = np.arange(count)
    number = lane
    while True:
        epoch, place = divmod(number, count)
        if epoch != known:
            known = epoch
            if shuffle:
                order = draws.permutation(count, seed, epoch, "shards")
        shard, part = divmod(int(order[place]), parts)
        yield Visit(epoch, shards[shard], part, parts)
        number += lanes


def count_of(visit: Visit, counts: Counts) -> int:
    """Samples of a visit."""
    return max(0, math.ceil((counts.of(visit.shard.place) - visit.part) / visit.parts))


def visit_samples(visit: Visit, counts: Counts) -> Iterator[Raw]:
    """The samples of a visit, in the shard's order."""
    number = -1
    for number, raw in enumerate(read_shard(visit.shard.place)):
        if number % visit.parts == visit.part:
            yield raw
    counts.remember(visit.shard.place, number + 1)


def pooled(entries: Iterator[T], size: int, pick: Callable[[Sequence[T], int], int]) -> Iterator[T]:
    """All entries, each picked from a pool of at most `size`; memory is that of the pool.

    Args:
        pick: chooses from the pool, given how many were taken before.
    """
    pool: list[T] = []
    taken = 0

    def take() -> T:
        nonlocal taken
        index = pick(pool, taken)
        pool[index], pool[-1] = pool[-1], pool[index]
        taken += 1
        return pool.pop()

    for entry in entries:
        pool.append(entry)
        if len(pool) >= size:
            yield take()
    while pool:
        yield take()
