"""Attaching a patch: what is added, and where."""

from __future__ import annotations

import copy
import inspect
import itertools
from itertools import takewhile

import pytest
import torch
import torch.nn as nn

from dmp_common import Patch, Schedule, attach
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import (
    DIT,
    UNETS,
    check_fields,
    close,
    make,
    pick,
    rows_of_mix,
    some,
    watched,
)


def test_each_site_alone_changes_the_output(kind):
    model, patch = kind.model(), make(kind, sites="all")
    base = kind.run(model)
    outputs = {}
    for name in patch.sites:
        with watched(model, patch, sites=[name]) as seen:
            outputs[name] = kind.run(model)
        assert (outputs[name] - base).abs().max() > 1e-4, name
        changed = [n for n in patch.sites if not torch.equal(seen.before[n], seen.after[n])]
        assert changed == [name]
        # A patch of this site only keeps the site's depth.
        single = Patch.create(kind.base, sites=[name]).eval()
        tensors = patch.tensors()
        single.load_tensors({k: tensors[k] for k in single.saved()})
        with attach(model, single):
            assert close(kind.run(model), outputs[name], 1e-6), name
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs.values(), 2))


def test_changed_time_embedding_of_the_model_is_seen(kind):
    """The base is the caller's: a LoRA may be merged into it between two calls."""
    model, patch = kind.model(), make(kind)
    with attach(model, patch), torch.no_grad():
        kind.run(model)
        for module in model.modules():
            if type(module).__name__ == "TimestepEmbedding":
                module.linear_2.weight.mul_(-1.0)
            elif type(module).__name__ == "TimestepEmbedder":
                module.mlp[2].weight.mul_(-1.0)
        found = kind.run(model)
    with attach(model, copy.deepcopy(patch)), torch.no_grad():
        assert torch.equal(found, kind.run(model))


def test_replaced_time_embedding_of_the_model_is_seen():
    """New weights may get the addresses of the old ones."""
    model, twin, patch = DIT.model(), DIT.model(), make(DIT)
    layer, other = (m.transformer_blocks[0].norm1.emb.timestep_embedder for m in (model, twin))
    memory = layer.linear_2.weight.detach().clone().numpy()
    with attach(model, patch), torch.no_grad():
        for turn in range(3):
            memory *= -1.2
            layer.linear_2.weight = nn.Parameter(torch.from_numpy(memory))
            other.linear_2.weight.copy_(layer.linear_2.weight)
            found = DIT.run(model)
            with attach(twin, copy.deepcopy(patch)):
                assert torch.equal(found, DIT.run(twin)), turn


def test_sites_none_means_all_of_them(kind):
    model, patch = kind.model(), make(kind)
    with attach(model, patch):
        everything = kind.run(model)
    with attach(model, patch, sites=list(patch.sites)):
        assert torch.equal(kind.run(model), everything)
    with attach(model, patch, sites=[]):
        assert torch.equal(kind.run(model), kind.run(kind.model()))


@pytest.mark.parametrize(
    "latent", [(8, 8), (12, 12), (32, 32), (20, 12), (8, 40)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_fields_fit_any_resolution(kind, latent):
    if kind.square_only:
        latent = (max(latent), max(latent))
    model, patch = kind.model(), make(kind, sites="all")
    base = kind.run(model, size=latent)
    with attach(model, kind.patch(None, sites="all")):
        assert torch.equal(kind.run(model, size=latent), base)
    with watched(model, patch, strength=0.75) as seen, torch.no_grad():
        first = kind.run(model, size=latent)
        check_fields(kind, patch, seen, latent, 0.75)
        assert torch.equal(kind.run(model, size=latent), first)  # from the cache
    assert not torch.equal(first, base)


def test_sizes_with_as_many_tokens_are_told_apart(kind):
    model, patch = kind.model(), make(kind, sites="all")
    with torch.no_grad():
        for latent in ((8, 8),) if kind.square_only else ((8, 16), (16, 8), (8, 16), (4, 32)):
            with watched(model, patch) as seen:
                kind.run(model, size=latent)
            check_fields(kind, patch, seen, latent)


@pytest.mark.parametrize("latent", [(9, 7), (15, 17), (1, 1), (3, 8)])
@some(*UNETS)
def test_unets_take_odd_sizes(tiny, latent):
    model, patch = tiny.model(), make(tiny, sites="all")
    base = tiny.run(model, size=latent)
    with attach(model, tiny.patch(None, sites="all")):
        assert torch.equal(tiny.run(model, size=latent), base)
    with watched(model, patch) as seen:
        tiny.run(model, size=latent)
    check_fields(tiny, patch, seen, latent)


def test_negative_and_large_strength_scale_the_field(kind):
    model, patch = kind.model(), make(kind)
    for strength in (-1.5, 3.0):
        with watched(model, patch, strength=strength) as seen:
            kind.run(model)
        check_fields(kind, patch, seen, (8, 8), strength)


def test_two_patches_add(kind):
    """Equal to one patch with the sum of the prompts: gates none, and gates equal."""
    model = kind.model()
    for variant in ({"gate": "none", "sites": "all"}, {"sites": "all"}):
        first, second = make(kind, 1, **variant), make(kind, 2, **variant)
        if "gate" not in variant:
            second.gate.load_state_dict(first.gate.state_dict())
        both = copy.deepcopy(first)
        with torch.no_grad():
            for name in both.sites:
                both.pool(name).prompts.add_(second.pool(name).prompts)
            if "gate" in variant:  # N = 256 times what a gate passes
                for patch in (first, second, both):
                    for name in patch.sites:
                        patch.pool(name).prompts.div_(patch.variant.count)
        with attach(model, both):
            expected = kind.run(model)
        with attach(model, first), attach(model, second):
            found = kind.run(model)
        with attach(model, second), attach(model, first):
            swapped = kind.run(model)
        with attach(model, first):
            assert not close(kind.run(model), expected, 1e-2)
        assert close(found, expected)
        assert close(swapped, found)
        with attach(model, first, strength=0.5), attach(model, first, strength=0.5):
            halves = kind.run(model)
        with attach(model, first):
            assert close(halves, kind.run(model))


def test_unequal_timesteps_of_a_batch_equal_single_runs(kind):
    model, patch = kind.model(), make(kind, sites="all")
    timesteps = [10.0, 900.0, 10.0, 500.0]
    inputs = kind.inputs(torch.tensor(timesteps), (8, 8), torch.float32, 1)
    schedule = Schedule(first=950.0, last=100.0, curve=((0.0, 0.2), (1000.0, 1.4)))
    for train, settings in itertools.product((False, True), ({}, {"schedule": schedule})):
        patch.train(train)
        with attach(model, patch, **settings), torch.no_grad():
            batch = kind.call(model, inputs)
            singles = torch.cat([kind.call(model, pick(inputs, [i], 4)) for i in range(4)])
            turned = kind.call(model, pick(inputs, [3, 2, 1, 0], 4))
        assert close(batch, singles)
        assert close(turned.flip(0), batch)
        assert not close(batch[0], batch[3], 1e-2)


def _rows_of_gate(patch: Patch, monkeypatch) -> list[int]:
    rows: list[int] = []
    logits = patch.gate.logits
    monkeypatch.setattr(patch.gate, "logits", lambda e: rows.append(len(e)) or logits(e))
    return rows


def test_equal_timesteps_are_computed_once(kind, monkeypatch):
    model, patch = kind.model(), make(kind, grid=6)  # resized at every site
    gate, mix = _rows_of_gate(patch, monkeypatch), rows_of_mix(monkeypatch)
    sites, embedded = len(patch.sites), []
    mlp = find_module(model, patch.base.times["diffusers"].mlp)
    mlp.register_forward_hook(lambda module, args, e: embedded.append(e))
    with attach(model, patch), torch.no_grad():
        for timesteps, distinct in (([7.0, 7.0, 7.0], 1), ([7.0, 9.0, 7.0], 2)):
            kind.run(model, timesteps)
            if torch.__version__ < (2, 4):  # a matrix product there may differ from row to row
                distinct = len(torch.unique(embedded[-1], dim=0))
            assert gate == [distinct]
            assert mix == [distinct] * sites
            kind.run(model, timesteps, seed=3)  # remembered, whatever the picture
            assert gate == [distinct]
            assert mix == [distinct] * sites
            gate.clear()
            mix.clear()


@some(*UNETS)
def test_scalar_timestep(tiny):
    model, patch = tiny.model(), make(tiny)
    inputs = tiny.inputs(torch.tensor([500.0, 500.0]), (8, 8), torch.float32, 1)
    for schedule in (None, Schedule(first=600.0, curve=((0.0, 0.5),))):
        with attach(model, patch, schedule=schedule):
            expected = model(**inputs, return_dict=False)[0]
            for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500])):
                given = inputs | {"timestep": timestep}
                assert torch.equal(model(**given, return_dict=False)[0], expected)
                sample = given.pop("sample")
                given.pop("timestep")
                by_position = model(sample, timestep, **given, return_dict=False)[0]
                assert torch.equal(by_position, expected)


def test_arguments_by_position_and_by_name_are_the_same(kind):
    """Models and blocks may be called either way."""
    model, patch = kind.model(), make(kind)
    inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    signature = inspect.signature(inspect.unwrap(type(model).forward))
    order = list(takewhile(inputs.__contains__, list(signature.parameters)[1:]))
    assert len(order) >= 3
    schedule = Schedule(first=500.0)
    for variant in ({}, {"condition": "t+y"} if kind is DIT else {}):
        patch = make(kind, **variant)
        with attach(model, patch, schedule=schedule):
            by_name = kind.call(model, inputs)
            rest = {key: value for key, value in inputs.items() if key not in order}
            found = kind.call(model, rest, *(inputs[key] for key in order))
        assert torch.equal(found, by_name)
