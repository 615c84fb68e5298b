"""Every held-out image once, and conditions of samples in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from training.data.batch import Batch, Position
from training.data.build import open_data
from training.data.sources.digits import KIND
from training.evaluation.heldout import HeldOutImages, once
from training.objective.inputs import Inputs
from training.objective.noise import Draws
from training.options.command_line import resolve


class Repeating:
    """Batches of two of some keys, without end; epochs only where they are known."""

    def __init__(self, keys: list[str], counted: bool, broken: str = "") -> None:
        self.keys, self.counted, self.broken = keys, counted, broken

    def batches(self, global_batch: int, **more: Any) -> Iterator[Batch]:
        number = 0
        while True:
            keys = [self.keys[(number + k) % len(self.keys)] for k in range(global_batch)]
            number += global_batch
            epoch = number // len(self.keys) if self.counted else 0
            weights = torch.tensor([float(key != self.broken) for key in keys])
            sizes = torch.zeros(len(keys), 6)
            yield Batch(keys=keys, sizes=sizes, next=Position(epoch, number), weights=weights)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("count", [4, 5])
def test_every_image_comes_once(counted: bool, count: int) -> None:
    keys = [f"image {n}" for n in range(count)]
    data: Any = Repeating(keys, counted, broken=keys[1])
    seen = [batch.keys[row] for batch, rows in once(data, 2, 0) for row in rows]
    assert seen == [keys[0], *keys[2:]]


def test_conditions_repeat_the_images_in_turn() -> None:
    def inputs(labels: list[int]) -> Inputs:
        count = len(labels)
        one = torch.zeros(count, 1, 2, 2)
        draws = Draws(one, one, torch.zeros(count), torch.zeros(count))
        return Inputs(one, draws, {"labels": torch.tensor(labels)}, None, [str(n) for n in labels])

    held_out = HeldOutImages([inputs([0, 1, 2]), inputs([3, 4])], [["a", "b", "c"], ["d", "e"]])
    found = list(held_out.conditions(9))
    assert [n for numbers, _, _ in found for n in numbers] == list(range(9))
    labels = [n for _, given, _ in found for n in given.given["labels"].tolist()]
    assert labels == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert [text for _, _, captions in found for text in captions or []] == list("abcdeabcd")
    assert not list(held_out.conditions(0))


def test_the_test_split_of_the_digits_is_their_own() -> None:
    options = resolve({"base": "digits"})
    sizes = {
        split: open_data(options, KIND, seed=0, split=split).size  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 1097, "validation": 300, "test": 400}
