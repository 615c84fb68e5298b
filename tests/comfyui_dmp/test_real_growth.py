"""Many pictures with masks, keyframes and hooks: nothing piles up, on ComfyUI's real models."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn as nn

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PICTURES, FIRST = 200, 40


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def alive() -> int:
    """The number of tensors."""
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize(("name", "mix"), [("sd3", "modulate"), ("sd15", "add")])
def test_two_hundred_pictures(nodes, real, run, name, mix, record_property):
    process = pytest.importorskip("psutil").Process()
    family = real.FAMILIES[name]
    model, record = family.comfy(), run.record(family.patch(mix=mix, std=0.2))
    plain = run.sample(model, family)
    clones: list[Any] = []
    counts: list[tuple[int, int]] = []
    for n in range(PICTURES):
        # Few curves, since the weights of each are remembered, up to a number of bytes.
        points = f"0: 1, {0.2 + n % 5 / 10:.1f}: 0.5, 1: 0"
        mask = torch.rand(1, 64, 32, generator=torch.Generator().manual_seed(n))
        patched = nodes["DMP_Apply"].execute(model, record, mask=mask, keyframes=points).result[0]
        clones.append(weakref.ref(patched))
        hooked = {"hooks": nodes["DMP_CreateHook"].execute(record).result[0]} if n % 2 else {}
        picture = run.sample(patched, family, **hooked)
        assert not torch.equal(picture, plain)
        del patched, hooked, picture
        if n + 1 in (FIRST, PICTURES):
            counts.append((alive(), process.memory_info().rss))
    (few, before), (many, after) = counts
    record_property("bytes", after - before)
    assert many <= few
    assert after - before < 2**25, f"grew by {(after - before) / 2**20:.0f} MiB"
    assert not hooks_on(model.model)
    assert len([each for each in clones if each() is not None]) <= 1
    assert torch.equal(run.sample(model, family), plain)
    assert not model.wrappers.get("apply_model")
