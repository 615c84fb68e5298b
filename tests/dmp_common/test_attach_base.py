"""Attaching a patch: exactly the base."""

from __future__ import annotations

import pytest
import torch

from dmp_common import PatchError, Schedule, attach
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import (
    REPRESENTATIVES,
    enable_checkpointing,
    make,
    same_weights,
    some,
    structure,
    weights,
)


@pytest.mark.parametrize("remember", [True, False], ids=["eval", "train"])
def test_zero_patch_and_strength_zero_are_the_base(tiny, remember):
    model = tiny.model()
    base = tiny.run(model)
    zero = tiny.patch(None, sites="all").train(not remember)
    patch = make(tiny, sites="all").train(not remember)
    with attach(model, zero):
        assert torch.equal(tiny.run(model), base)
        assert torch.equal(tiny.run(model), base)  # from the cache
    with attach(model, patch, strength=0.0):
        assert torch.equal(tiny.run(model), base)
    with attach(model, patch):
        assert not torch.equal(tiny.run(model), base)
    with attach(model, patch, strength=0.0, schedule=Schedule(curve=((0.0, 1.0),))):
        assert torch.equal(tiny.run(model), base)


def test_attach_then_remove_leaves_no_trace(tiny):
    model = tiny.model()
    enable_checkpointing(model)
    base, before = tiny.run(model), weights(model)
    shape, versions = structure(model), [p._version for p in model.parameters()]
    patch = make(tiny, sites="all")
    with attach(model, patch) as attachment:
        tiny.run(model).square().mean().backward()
        with torch.no_grad():
            tiny.run(model, size=(16, 16))
        assert attachment.calls == 2
        assert structure(model) != shape
    assert structure(model) == shape
    assert versions == [p._version for p in model.parameters()]
    assert same_weights(model, before)
    assert torch.equal(tiny.run(model), base)


def test_attached_model_has_the_state_dict_of_the_base(kind):
    model = kind.model()
    before = weights(model)
    with attach(model, make(kind, sites="all")):
        kind.run(model)
        assert same_weights(model, before)


@pytest.mark.parametrize("first_out", [0, 1])
def test_remove_is_idempotent_and_takes_only_its_own_patch(kind, first_out):
    model = kind.model()
    base, shape = kind.run(model), structure(model)
    patches = [make(kind, 1), make(kind, 2)]
    alone = []
    for patch in patches:
        with attach(model, patch):
            alone.append(kind.run(model))
    attachments = [attach(model, patch) for patch in patches]
    assert not torch.equal(kind.run(model), base)
    for _ in range(2):
        attachments[first_out].remove()
        assert torch.equal(kind.run(model), alone[1 - first_out])
    for _ in range(2):
        attachments[1 - first_out].remove()
        assert structure(model) == shape
        assert torch.equal(kind.run(model), base)


class Interrupted(BaseException):
    """As A1111's InterruptedException."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@some(*REPRESENTATIVES)
def test_error_inside_the_model(tiny, error):
    model = tiny.model()
    base, shape = tiny.run(model), structure(model)
    patch = make(tiny, sites="all")
    with attach(model, patch):
        patched = tiny.run(model)
    last = list(patch.sites.values())[-1]
    module = find_module(model, last.paths["diffusers"])

    def fail(module, args, output):
        raise error

    def failing_run():
        handle = module.register_forward_hook(fail)
        try:
            tiny.run(model)
        finally:
            handle.remove()

    with pytest.raises(error), attach(model, patch):
        failing_run()
    assert structure(model) == shape
    assert torch.equal(tiny.run(model), base)
    with attach(model, patch):
        with pytest.raises(error):
            failing_run()
        if error is RuntimeError:  # torch runs no hooks after an interrupt
            with pytest.raises(PatchError, match="outside of a forward call"):
                module(torch.zeros(1, 1))  # the failed call's context must not serve here
        assert torch.equal(tiny.run(model), patched)
    assert torch.equal(tiny.run(model), base)
