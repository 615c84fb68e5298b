"""The order of items: whole, of one bucket a batch, the same from any position and rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmp_common import PatchError
from training.data.batch import Position
from training.data.loader import ahead
from training.data.order import Order, share

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=60)
BATCHES = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(BUCKETS, BATCHES, st.integers(0, 3), st.booleans())
def test_nothing_is_dropped_and_little_is_repeated(
    buckets: list[int], batch: int, epoch: int, shuffle: bool
) -> None:
    plan = Order(buckets, 5, shuffle).plan(epoch, batch)
    seen = Counter(plan.ravel().tolist())
    assert set(seen) == set(range(len(buckets)))
    for row in plan:
        assert len({buckets[item] for item in row}) == 1
    for bucket, count in Counter(buckets).items():
        times = [seen[item] for item, which in enumerate(buckets) if which == bucket]
        assert max(times) - min(times) <= 1  # filled up evenly
        assert sum(times) == -(-count // batch) * batch


@settings(max_examples=50, deadline=None)
@given(BUCKETS, BATCHES)
def test_fills_are_the_repeats_of_validation(buckets: list[int], batch: int) -> None:
    order = Order(buckets, 5, shuffle=False)
    kept = order.plan(0, batch)[~order.fills(batch)]
    assert sorted(kept.tolist()) == list(range(len(buckets)))


@settings(max_examples=50, deadline=None)
@given(BUCKETS, BATCHES, st.integers(0, 40))
def test_positions_go_on_from_anywhere(buckets: list[int], batch: int, cut: int) -> None:
    order = Order(buckets, 5, shuffle=True)
    whole = list(islice(order.positions(Position(), batch), 60))
    after = order.after(whole[cut], batch)
    assert list(islice(order.positions(after, batch), 19)) == whole[cut + 1 : cut + 20]
    # A position counted in batches of epoch 0 alone means the same.
    assert next(order.positions(Position(0, cut), batch)) == whole[cut]


def test_over_epochs_no_image_is_preferred() -> None:
    order = Order([0] * 5, 1, shuffle=True)
    seen = Counter(n for e in range(400) for n in order.plan(e, 4).ravel().tolist())
    assert max(seen.values()) < 1.12 * min(seen.values())


def test_epochs_seeds_and_batches_are_shuffled() -> None:
    plans = [Order([0, 1] * 8, seed, True).plan(epoch, 4) for seed in (1, 2) for epoch in (0, 1)]
    assert len({plan.tobytes() for plan in plans}) == 4
    assert np.array_equal(plans[0], Order([0, 1] * 8, 1, True).plan(0, 4))
    first = {int(Order([0, 1] * 8, 1, True).plan(e, 4)[0, 0]) % 2 for e in range(9)}
    assert first == {0, 1}


@pytest.mark.parametrize(("batch", "rank", "world"), [(5, 0, 2), (0, 0, 1), (4, 4, 4), (1, 0, 2)])
def test_shares_that_do_not_divide(batch: int, rank: int, world: int) -> None:
    with pytest.raises(PatchError, match="share equally"):
        share(batch, rank, world)


def test_loading_ahead_keeps_order_and_errors() -> None:
    def numbers() -> Iterator[int]:
        yield from range(4)
        raise PatchError("broken")

    batches = ahead(numbers())
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(PatchError, match="broken"):
        next(batches)
