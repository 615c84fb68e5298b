"""Attaching a patch: prepended prompts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError, Schedule, attach
from tests.dmp_common.attaching import DIT, checkpoint, close, gradients, make, same_gradients


def test_prepended_prompts_act_on_dit():
    tiny, model = DIT, DIT.model()
    patch = make(tiny, std=0.05, mix="prepend")
    assert all(pool.prompts.shape == (1, 50, 32) for pool in patch.pools.values())
    base = tiny.run(model)
    lengths = []
    handles = [
        block.attn1.register_forward_pre_hook(
            lambda m, args, kwargs: lengths.append((args + tuple(kwargs.values()))[0].shape[1]),
            with_kwargs=True,
        )
        for block in model.transformer_blocks
    ]
    with attach(model, patch):
        patched = tiny.run(model)
    for handle in handles:
        handle.remove()
    assert lengths == [66, 66, 66]  # 50 prompts and 16 tokens, each block anew
    assert patched.shape == base.shape
    assert not close(patched, base, 1e-3)
    with attach(model, patch, sites=["block.1"]):
        assert not torch.equal(tiny.run(model), base)
    assert torch.equal(tiny.run(model), base)
    found = gradients(tiny, model, patch, between=True)
    checkpoint(model)
    same_gradients(gradients(tiny, model, patch, between=True), found)


def test_prepended_prompts_equal_a_plain_restatement():
    tiny, model = DIT, DIT.model()
    patch = make(tiny, std=0.05, mix="prepend")
    with attach(model, patch, strength=0.5):
        found = tiny.run(model)
    es: list[Tensor] = []
    mlp = model.transformer_blocks[0].norm1.emb.timestep_embedder
    handles = [mlp.register_forward_hook(lambda m, a, out: es.append(out))]
    tiny.run(model)

    def before(depth):
        def hook(module, args, kwargs):
            inputs = torch.cat([es[0], torch.full((2, 1), float(depth))], dim=1)
            w = (inputs @ patch.gate.weight.T + patch.gate.bias).softmax(-1)
            prompts = 0.5 * w[..., None] * patch.pools[f"block_{depth}"].prompts[0]
            return (torch.cat([prompts, args[0]], dim=1), *args[1:]), kwargs

        return hook

    for depth, block in enumerate(model.transformer_blocks):
        handles.append(block.register_forward_pre_hook(before(depth), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, a, out: out[:, 50:]))
    assert close(found, tiny.run(model))
    for handle in handles:
        handle.remove()


def test_prepended_prompts_at_strength_zero_are_the_base():
    model, patch = DIT.model(), make(DIT, std=0.05, mix="prepend")
    base = DIT.run(model)
    with attach(model, patch, strength=0.0):
        assert torch.equal(DIT.run(model), base)
    with attach(model, patch, schedule=Schedule(first=5.0)):
        assert torch.equal(DIT.run(model), base)


def test_hosts_refuse_prepended_prompts():
    patch = make(DIT, mix="prepend")
    context = patch.prepare(torch.randn(1, 32), (8, 8))
    with pytest.raises(PatchError, match="prepends its prompts"):
        context.add("block.0", torch.zeros(1, 16, 32))
