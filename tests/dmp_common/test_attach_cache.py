"""Attaching a patch: the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from dmp_common import Patch, attach
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import (
    DIT,
    REPRESENTATIVES,
    SD15,
    add_in_place,
    alone,
    close,
    gradients,
    make,
    some,
)
from tests.tiny import Tiny


def test_inference_mode_then_gradients(kind):
    """What inference mode left in the caches serves training, and the other way round."""
    model, patch = kind.model(), make(kind, sites="all")
    fresh = gradients(kind, model, copy.deepcopy(patch))
    frozen = copy.deepcopy(patch).requires_grad_(False)
    with attach(model, patch), attach(model, frozen, strength=-0.5):
        with torch.inference_mode():
            expected = kind.run(model).clone()
        assert torch.equal(kind.run(model), expected)
        with torch.no_grad():
            assert torch.equal(kind.run(model), expected)
        with torch.inference_mode():
            assert torch.equal(kind.run(model), expected)
    for value, gradient in gradients(kind, model, patch).items():
        assert close(gradient, fresh[value])
    # Gradients with respect to the picture, through remembered fields.
    inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    picture = next(iter(inputs.values()))
    picture = picture[0] if isinstance(picture, list) else picture
    picture.requires_grad_()
    found = []
    for warm in (False, True):
        other = copy.deepcopy(frozen)
        with attach(model, other):
            if warm:
                with torch.inference_mode():
                    kind.run(model)
                assert len(other.cache) > 0
            kind.call(model, inputs).square().sum().backward()
        found.append(picture.grad)
        picture.grad = None
    assert torch.equal(*found)
    assert found[0].any()


@some(*REPRESENTATIVES)
def test_patch_made_in_inference_mode(tiny):
    model = tiny.model()
    with attach(model, make(tiny)):
        expected = tiny.run(model)
    with torch.inference_mode():
        patch = make(tiny)
        with attach(model, patch):
            assert torch.equal(tiny.run(model), expected)
            patch.pool(next(iter(patch.sites))).prompts.mul_(2)
            changed = tiny.run(model)
        assert not torch.equal(changed, expected)
    with attach(model, copy.deepcopy(patch)):
        assert torch.equal(tiny.run(model), changed)


def _step(patch: Patch, tiny: Tiny, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(patch.parameters(), lr=0.1)
    with torch.enable_grad():
        tiny.run(model).square().mean().backward()
    optimizer.step()


def _gate(patch: Patch, *_: object) -> None:
    with torch.no_grad():
        patch.gate.bias[0] += 3.0


def _load(patch: Patch, *_: object) -> None:
    patch.load_tensors({name: value * 1.5 for name, value in patch.tensors().items()})


def _state(patch: Patch, *_: object) -> None:
    patch.load_state_dict({name: value * 1.5 for name, value in patch.state_dict().items()})


def _vector(patch: Patch, *_: object) -> None:
    vector = nn.utils.parameters_to_vector(patch.parameters()).detach()
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(vector[: parameter.numel()].view_as(parameter) * 1.1)
            vector = vector[parameter.numel() :]


def _inference(patch: Patch, *_: object) -> None:
    with torch.inference_mode():
        patch.gate.weight.mul_(-1.0)


@pytest.mark.parametrize("change", [add_in_place, _gate, _step, _load, _state, _vector, _inference])
def test_change_in_place_between_two_forwards_is_seen(kind, change: Callable):
    model, patch = kind.model(), make(kind)
    for learns in (True, False) if change is not _step else (True,):
        patch.requires_grad_(learns)
        with attach(model, patch), torch.no_grad():
            old = kind.run(model)
            assert len(patch.cache) > 0
            change(patch, kind, model)
            new = kind.run(model)
        with attach(model, copy.deepcopy(patch)), torch.no_grad():
            expected = kind.run(model)
        assert torch.equal(new, expected)
        assert not torch.equal(new, old)


def test_gradients_switched_on_and_off_between_forwards(kind):
    model, patch = kind.model(), make(kind).requires_grad_(False)
    with attach(model, patch):
        expected = kind.run(model)
        assert len(patch.cache) > 0
        assert not expected.requires_grad
        patch.requires_grad_(True)
        output = kind.run(model)
        assert close(output, expected, 1e-6)
        output.square().mean().backward()
        assert all(p.grad.any() for p in patch.parameters())
        patch.requires_grad_(False)
        assert torch.equal(kind.run(model), expected)


@pytest.mark.parametrize("name", ["prompts", "weight"])
@some(SD15, DIT)
def test_replaced_parameter_is_seen(tiny, name):
    """A new tensor may get the address of one that was freed, as CUDA's allocator often does."""
    model, patch = tiny.model(), make(tiny)
    owner = patch.gate if name == "weight" else patch.pool(next(iter(patch.sites)))
    memory = getattr(owner, name).detach().clone().numpy()
    with attach(model, patch), torch.no_grad():
        for turn in range(3):
            memory *= -1.5
            setattr(owner, name, nn.Parameter(torch.from_numpy(memory)))
            assert torch.equal(tiny.run(model), alone(tiny, copy.deepcopy(patch))), turn


def test_assigned_and_converted_states_are_seen():
    model, patch = DIT.model(), make(DIT)
    states = [make(DIT, seed).state_dict() for seed in range(3)]
    with attach(model, patch), torch.no_grad():
        for turn in range(6):
            values = {name: value.clone() for name, value in states[turn % 3].items()}
            patch.load_state_dict(values, assign=True)
            del values
            assert torch.equal(DIT.run(model), alone(DIT, copy.deepcopy(patch))), turn
            patch.bfloat16().float()
            assert torch.equal(DIT.run(model), alone(DIT, copy.deepcopy(patch))), turn


@some(*REPRESENTATIVES)
def test_scale_for_learning_is_no_change(tiny):
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
        patch.scale_for_learning()
        assert close(tiny.run(model), expected, 1e-6)


def test_cache_limit_is_respected_and_changes_nothing(kind):
    model, patch = kind.model(), make(kind)
    none, small = copy.deepcopy(patch), copy.deepcopy(patch)
    none.cache.limit = 0
    steps = [[t, t] for t in (999.0, 700.0, 400.0, 100.0, 700.0, 999.0)]
    outputs = []
    for each in (patch, none, small):
        small.cache.limit = patch.cache.bytes // 2
        with attach(model, each), torch.no_grad():
            run = []
            for step in steps:
                run.append(kind.run(model, step))
                held = sum(value.nbytes for value in each.cache.values())
                assert held == each.cache.bytes <= each.cache.limit
        outputs.append(run)
    assert len(none.cache) == 0
    assert 0 < len(small.cache) < len(patch.cache)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outputs, strict=True))
    patch.cache.clear()
    assert len(patch.cache) == patch.cache.bytes == 0


def test_cached_tensors_are_not_what_blocks_may_write_to(kind):
    """Some host code writes into the stream in place; a remembered field must survive it."""
    model, patch = kind.model(), make(kind, sites="all")
    with attach(model, patch), torch.no_grad():
        expected = kind.run(model)
        handles = []
        for site in patch.sites.values():
            key = site.arguments["diffusers"]

            def write(module, args, kwargs, key=key):
                x = args[key.index] if len(args) > key.index else kwargs[key.name]
                x.mul_(0.0)

            module = find_module(model, site.paths["diffusers"])
            handles.append(module.register_forward_pre_hook(write, with_kwargs=True))
        kind.run(model)
        for handle in handles:
            handle.remove()
        assert torch.equal(kind.run(model), expected)
