"""The training loop of the node by itself: half precision, bad numbers, order, ends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from comfyui_dmp.fitting import Recipe, fit, measured_gap
from comfyui_dmp.plots import loss_curve, side_by_side
from comfyui_dmp.states import States, batches, held_back
from dmp_common import PatchError
from dmp_common.patch.levels import gap_weights

WEIGHTS = gap_weights(torch.ones(20))


def states(count: int = 6) -> States:
    source = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(count, 4, 2, 2, generator=source) for _ in range(2))
    t = torch.linspace(1, 999, count)
    return States(noisy, t / 100, t, target, torch.arange(count) % 2)


def layer() -> Any:
    made = nn.Linear(2, 2)
    with torch.no_grad():
        made.weight.zero_()
        made.bias.zero_()
    return made


def trained(made: Any, half: bool = False, factor: float = 1.0, steps: int = 5) -> list[float]:
    losses: list[float] = []

    def told(step: int, loss: float) -> bool:
        losses.append(loss)
        return step < 4

    def predict(_: int, own: States) -> Tensor:
        # What comes back through half precision is infinite beyond 65504.
        out = made(own.noisy) * factor
        if half:
            out.register_hook(lambda gradient: gradient.half().to(gradient))
        return out

    recipe = Recipe(steps, 0.01, 1)
    fit(made, predict, states(), batches(6, 4, 0), recipe, WEIGHTS, told, half)
    return losses


def test_half_precision_scales_the_loss_and_changes_nothing_else():
    full, half = layer(), layer()
    assert len(trained(full)) == 4  # it was told to stop
    trained(half, half=True)
    torch.testing.assert_close(half.weight, full.weight, atol=1e-4, rtol=1e-3)
    # Gradients that are infinite at the usual scale: a smaller one is found.
    large = layer()
    trained(large, half=True, factor=300.0)
    assert bool(large.weight.isfinite().all() and large.weight.any())


def test_numbers_that_are_not_finite_are_told():
    with pytest.raises(PatchError, match="expected a finite loss.* in step 1: lower"):
        trained(layer(), factor=float("nan"))
    kept = states()
    with pytest.raises(PatchError, match="finite predictions of both models"):
        measured_gap(lambda _, own: own.noisy * float("nan"), kept, 0)
    with pytest.raises(PatchError, match="expected a cheap model that differs"):
        measured_gap(lambda _, own: own.target, kept, 0)
    with pytest.raises(PatchError, match="expected states of the exact model"):
        States.joined([])


def test_the_gap_counts_alike_at_every_noise_level():
    kept = states(40)
    sizes = kept.t[:, None, None, None] / 1000  # the gap grows along the schedule
    gap = measured_gap(lambda _, own: own.target + own.t[:, None, None, None] / 1000, kept, 0)
    errors = sizes.square().flatten()
    assert gap.mean == pytest.approx(float(errors.mean()), rel=0.05)
    assert float((gap.weights(kept.t) * errors)[5:].std()) < 0.1 * gap.mean


def test_whole_drawings_are_held_back_where_there_are_enough():
    runs = [replace(states(4), condition=torch.full((4,), n)) for n in range(17)]
    trained, held = held_back(runs, 0)
    assert set(held.condition.tolist()) == {7, 15}
    assert set(trained.condition.tolist()) == set(range(17)) - {7, 15}
    few, some = held_back(runs[:3], 0)
    assert (len(few), len(some)) == (11, 1)
    one, same = held_back([states(2)], 0)
    assert len(one) == len(same) == 2


def test_every_state_is_seen_in_each_epoch():
    order = list(itertools.islice(batches(5, 2, 3), 6))
    assert all(len(rows) == 2 for rows in order)
    assert set(torch.cat(order[:3]).tolist()) == set(range(5))
    again = list(itertools.islice(batches(5, 2, 3), 6))
    assert all(map(torch.equal, order, again))
    assert not torch.equal(torch.cat(order[:3]), torch.cat(order[3:]))


def test_pictures_of_a_training():
    blank, drawn = loss_curve([], 10, ""), loss_curve([1.0, 0.5, 0.25], 10, "")
    assert blank.size == drawn.size
    assert blank.tobytes() != drawn.tobytes()
    beside = side_by_side([("a long label", torch.rand(1, 4, 4, 3)), ("b", torch.rand(1, 4, 4, 3))])
    assert beside.shape[0] == 1
    assert beside.shape[3] == 3
    assert 0 <= float(beside.min()) < float(beside.max()) <= 1
