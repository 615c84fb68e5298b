"""Attaching a patch: copies and devices."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, PatchError, attach
from tests.dmp_common.attaching import (
    DIT,
    REPRESENTATIVES,
    add_in_place,
    alone,
    close,
    make,
    site_shape,
    some,
)


def _pickled(patch: Patch) -> Patch:
    return pickle.loads(pickle.dumps(patch))


def _torch_saved(patch: Patch) -> Patch:
    file = io.BytesIO()
    torch.save(patch, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, _pickled, _torch_saved])
@some(*REPRESENTATIVES)
def test_copies_are_equal_and_independent(tiny, clone):
    model, patch = tiny.model(), make(tiny, sites="all")
    patch.metadata = {"ss_note": "kept"}
    patch.scale_for_learning()
    next(patch.parameters()).requires_grad_(False)
    patch.cache.limit = 12345678
    expected = alone(tiny, patch)
    random = torch.get_rng_state()
    other = clone(patch)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(other.cache) == 0
    assert other.cache.limit == 12345678
    assert other.metadata == patch.metadata
    assert other.variant == patch.variant
    assert other.training is False
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in patch.parameters()
    ]
    for name, value in patch.tensors().items():
        assert torch.equal(other.tensors()[name], value)
    with attach(model, other), torch.no_grad():
        assert torch.equal(tiny.run(model), expected)
        for parameter in other.parameters():
            parameter.mul_(2.0)
        other.metadata["ss_note"] = "changed"
        assert not torch.equal(tiny.run(model), expected)
    assert torch.equal(alone(tiny, patch), expected)
    assert patch.metadata == {"ss_note": "kept"}


def test_copy_of_a_module_that_holds_a_patch_and_of_a_training_patch():
    patch = make(DIT).train()
    holder = nn.ModuleDict({"a": patch, "b": patch})
    other = copy.deepcopy(holder)
    assert other["a"] is other["b"] is not patch
    assert other["a"].training
    state = patch.state_dict()
    assert all(torch.equal(other["a"].state_dict()[k], state[k]) for k in state)


def test_patch_on_another_device_than_the_model(kind):
    """The meta device stands for another one: shapes are right, and changes are followed."""
    patch = make(kind)
    name, site = next(iter(patch.sites.items()))
    shape = site_shape(patch.base, site, 2)
    e = torch.randn(2, kind.base.embedding, device="meta")
    x = torch.zeros(shape, device="meta")
    added = patch.prepare(e, (8, 8)).add(name, x)
    assert added.shape == x.shape
    assert added.device.type == "meta"
    with pytest.raises(PatchError, match=r"patch is on cpu and the model on meta.*move the patch"):
        patch.train().prepare(e, (8, 8))


def test_patch_of_inference_tensors_on_another_device():
    with torch.inference_mode():
        patch = make(DIT)
        patch.prepare(torch.randn(2, 32, device="meta"), (8, 8))


def test_change_of_inference_tensors_is_seen_on_another_device():
    """They do not count their changes."""
    with torch.inference_mode():
        patch = make(DIT)
        first = patch.runtime.copied(torch.device("cpu")).patch.gate.weight.clone()
        patch.gate.weight.mul_(2.0)
        other = patch.runtime.copied(torch.device("cpu")).patch
        assert torch.equal(other.gate.weight, 2.0 * first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_patch_on_the_cpu_model_on_the_gpu(kind):
    expected = alone(kind, make(kind))
    model, patch = kind.model().cuda(), make(kind)

    def run() -> Tensor:
        inputs = kind.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)

        def move(value):
            if isinstance(value, dict):
                return {key: move(each) for key, each in value.items()}
            if isinstance(value, list):
                return [move(each) for each in value]
            return value.cuda() if isinstance(value, Tensor) else value

        return kind.call(model, move(inputs)).cpu()

    with attach(model, patch), torch.no_grad():
        assert close(run(), expected, 1e-3)
        with torch.inference_mode():
            run()
        add_in_place(patch)
        changed = run()
        assert not close(changed, expected, 1e-3)
    assert close(changed, alone(kind, patch), 1e-3)
    assert all(p.device.type == "cpu" for p in patch.parameters())
