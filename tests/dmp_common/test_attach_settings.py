"""Attaching a patch: settings and schedule."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from dmp_common import Schedule, Settings, attach
from tests.dmp_common.attaching import close, make, plain_field, rows_of_mix, split_tokens, watched


def test_settings_changed_between_calls_are_not_stale(kind):
    model, patch = kind.model(), make(kind)
    names = list(patch.sites)
    choices = [
        Settings(),
        Settings(strength=0.5),
        Settings(temperature=3.0),
        Settings(sites=frozenset(names[1:])),
        Settings(sites=frozenset(names[:1])),
        Settings(schedule=Schedule(first=500.0)),
        Settings(schedule=Schedule(curve=((0.0, 1.0), (1000.0, 0.0)))),
        Settings(),
    ]
    with attach(model, patch) as attachment, torch.no_grad():
        found = []
        for attachment.settings in choices:
            found.append(kind.run(model))
    assert torch.equal(found[0], found[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[:-1], 2))
    for settings, output in zip(choices, found, strict=True):
        fresh = copy.deepcopy(patch)
        fresh.cache.limit = 0
        with attach(
            model,
            fresh,
            strength=settings.strength,
            schedule=settings.schedule,
            temperature=settings.temperature,
            sites=settings.sites,
        ):
            assert close(kind.run(model), output, 1e-6)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_schedule_factor_is_applied_item_by_item(kind, train):
    model, patch = kind.model(), make(kind, sites="all").train(train)
    timesteps = [950.0, 700.0, 300.0, 20.0]
    schedule = Schedule(first=900.0, last=100.0, curve=((100.0, 0.0), (700.0, 1.5)))
    factors = [0.0, 1.5, 0.5, 0.0]
    base = kind.run(model, timesteps)
    with watched(model, patch, strength=0.8, schedule=schedule) as seen:
        output = kind.run(model, timesteps)
    for name in patch.sites:
        added = seen.after[name] - seen.before[name]
        e = seen.e[0]
        if patch.base.layout == "map":
            own = added[:, : patch.sites[name].width]
            field = plain_field(patch, name, e, tuple(own.shape[2:]))
        else:
            side = 8 // patch.sites[name].stride
            own = split_tokens(kind, added, side * side)[0]
            field = plain_field(patch, name, e, (side, side)).flatten(2).transpose(1, 2)
        for item, factor in enumerate(factors):
            assert (own[item] - 0.8 * factor * field[item]).abs().max() < 2e-5
    assert torch.equal(output[[0, 3]], base[[0, 3]])
    assert not close(output[1], base[1], 1e-2)
    assert not close(output[2], base[2], 1e-2)


def test_schedule_ends_are_inside(kind):
    model, patch = kind.model(), make(kind)
    for t, train in ((0.0, False), (137.0, True), (999.0, False), (1000.0, True)):
        patch.train(train)
        base = kind.run(model, [t, t])
        with attach(model, patch):
            full = kind.run(model, [t, t])
        for schedule, acts in (
            (Schedule(first=t), True),
            (Schedule(last=t), True),
            (Schedule(first=t, last=t), True),
            (Schedule(first=t - 0.5), False),
            (Schedule(last=t + 0.5), False),
        ):
            with attach(model, patch, schedule=schedule):
                assert torch.equal(kind.run(model, [t, t]), full if acts else base), (t, schedule)


def test_schedule_outside_of_its_range_costs_no_field(kind, monkeypatch):
    model, patch = kind.model(), make(kind, grid=6)
    mix = rows_of_mix(monkeypatch)
    with attach(model, patch, schedule=Schedule(first=500.0)), torch.no_grad():
        base = kind.run(kind.model(), [800.0, 900.0])
        assert torch.equal(kind.run(model, [800.0, 900.0]), base)
        assert mix == []
        kind.run(model, [300.0, 200.0])
        assert len(mix) == len(patch.sites)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_patch_of_a_part_of_the_timesteps_is_off_elsewhere(kind, train):
    """Item by item, exactly the base outside, and together with a schedule."""
    model, whole = kind.model(), make(kind).train(train)
    timesteps = [999.5, 500.0, 499.5, 100.0, 99.0]
    base = kind.run(model, timesteps)
    with attach(model, whole):
        full = kind.run(model, timesteps)
    ranges = {
        (0, 1000): [1, 1, 1, 1, 1],
        (0, 500): [0, 0, 1, 1, 1],
        (100, 1000): [1, 1, 1, 1, 0],
        (100, 500): [0, 0, 1, 1, 0],
        (0, 50): [0, 0, 0, 0, 0],
    }
    for own, acts in ranges.items():
        patch = make(kind, timesteps=own).train(train)
        patch.load_tensors(whole.tensors())
        for schedule, also in ((Schedule(), [1] * 5), (Schedule(last=100.0), [1, 1, 1, 1, 0])):
            with attach(model, patch, schedule=schedule):
                found = kind.run(model, timesteps)
            for item, on in enumerate(acts):
                wanted = full if on and also[item] else base
                assert close(found[item], wanted[item], 1e-5), (own, schedule, item)
                if not on:
                    assert torch.equal(found[item], base[item])
