"""Attaching a patch: types and layouts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dmp_common import attach
from tests.dmp_common.attaching import (
    REPRESENTATIVES,
    UNETS,
    base_output,
    close,
    gradients,
    make,
    some,
    watched,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_model_with_float32_patch(tiny, dtype):
    half = tiny.model(dtype=dtype)
    full = tiny.model(dtype=dtype).float()
    patch = make(tiny, sites="all")
    base, reference = base_output(tiny, half, dtype), tiny.run(full)
    assert base.dtype == dtype
    with attach(half, tiny.patch(None, sites="all")):
        assert torch.equal(tiny.run(half, dtype=dtype), base)
    with watched(half, patch) as seen, torch.no_grad():
        found = tiny.run(half, dtype=dtype)
        assert torch.equal(tiny.run(half, dtype=dtype), found)
    assert all(x.dtype == dtype for x in seen.after.values())
    with attach(full, patch):
        expected = tiny.run(full)
    assert found.dtype == dtype
    assert all(p.dtype == torch.float32 for p in patch.parameters())
    rounding = (base.float() - reference).abs().max()  # the model's own, without a patch
    assert (found.float() - expected).abs().max() < 4 * rounding + 1e-3
    assert not close(found.float(), base.float(), 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@some(*REPRESENTATIVES)
def test_gradients_of_a_half_precision_model_arrive_in_float32(tiny, dtype):
    model, patch = tiny.model(dtype=dtype), make(tiny)
    full = tiny.model(dtype=dtype).float()
    base_output(tiny, model, dtype)
    found = gradients(tiny, model, patch, dtype=dtype)
    expected = gradients(tiny, full, patch)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.97, name


@pytest.mark.parametrize("patch_dtype", [torch.bfloat16, torch.float64])
@some(*REPRESENTATIVES)
def test_patch_of_another_type(tiny, patch_dtype):
    model, patch = tiny.model(), make(tiny)
    rounded = copy.deepcopy(patch).to(patch_dtype).float()
    with attach(model, rounded):
        expected = tiny.run(model)
    with attach(model, patch.to(patch_dtype)):
        assert close(tiny.run(model), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Flux's own norm
@some(*REPRESENTATIVES)
def test_autocast(tiny):
    model, patch = tiny.model(), make(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        base = base_output(tiny, model, torch.float32)
    with attach(model, patch):
        expected = tiny.run(model)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                found = tiny.run(model)
            tiny.run(model).float().square().mean().backward()
    with attach(model, tiny.patch(None)), torch.autocast("cpu", torch.bfloat16):
        zero = tiny.run(model)
    assert torch.equal(zero, base)
    assert close(found.float(), expected, 0.1)
    assert all(p.grad is not None and p.grad.any() for p in patch.parameters())


@some(*UNETS)
def test_channels_last(tiny):
    model, patch = tiny.model(), make(tiny, sites="all")
    with attach(model, patch), torch.no_grad():
        expected = tiny.run(model)
    model.to(memory_format=torch.channels_last)
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 8), torch.float32, 1)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    base = model(**inputs, return_dict=False)[0]
    with attach(model, tiny.patch(None, sites="all")):
        assert torch.equal(model(**inputs, return_dict=False)[0], base)
    with watched(model, patch) as seen, torch.no_grad():  # the patch remembers the other layout
        found = model(**inputs, return_dict=False)[0]
    assert close(found, expected)
    for name, x in seen.before.items():
        assert seen.after[name].stride() == x.stride(), name
