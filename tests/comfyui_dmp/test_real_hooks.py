"""A patch as one of ComfyUI's hooks, on real models, as its samplers call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hooks(comfyui_path) -> Any:
    import comfy.hooks

    return comfy.hooks


def sampled(run: Any, family: Any, model: Any, hooks: tuple[Any, Any], cfg: float = 3.0) -> Tensor:
    """A sampling whose positive and negative conditioning have hooks."""
    import comfy.hooks
    import comfy.sample

    conds = [run.conditioning(family, sign) for sign in (1.0, -1.0)]
    positive, negative = comfy.hooks.set_conds_props(conds, 1.0, "default")
    pair = [
        cond if own is None else comfy.hooks.set_hooks_for_conditioning(cond, own)
        for cond, own in zip((positive, negative), hooks, strict=True)
    ]
    noise = torch.randn(family.inputs(1)[0].shape, generator=torch.Generator().manual_seed(5))
    arguments = (*pair, torch.zeros_like(noise))
    return comfy.sample.sample(
        model, noise, 3, cfg, "euler", "normal", *arguments, disable_pbar=True, seed=5
    )


@pytest.mark.parametrize(("name", "mix"), [("sd3", "modulate"), ("sd15", "add")])
def test_a_hook_acts_for_its_conditioning_alone(nodes, real, run, host, hooks, name, mix):
    family = real.FAMILIES[name]
    model, record = family.comfy(), run.record(family.patch(mix=mix, std=0.2))
    hook = nodes["DMP_CreateHook"].execute(record).result[0]
    patched = host.attach(model, record)
    plain = sampled(run, family, model, (None, None))
    both = sampled(run, family, patched, (None, None))
    assert torch.equal(sampled(run, family, model, (hook, hook)), both)
    first = sampled(run, family, model, (hook, None))
    assert not torch.equal(first, plain)
    assert not torch.equal(first, both)
    alone = sampled(run, family, model, (hook, None), cfg=1.0)
    assert torch.equal(alone, sampled(run, family, patched, (None, None), cfg=1.0))
    # Two hooks add up, also with one on the model; nothing is left behind.
    twice = nodes["DMP_CreateHook"].execute(record, hook).result[0]
    assert len(hook) == 1
    two = sampled(run, family, host.attach(patched, record), (None, None))
    torch.testing.assert_close(sampled(run, family, model, (twice, twice)), two)
    torch.testing.assert_close(sampled(run, family, patched, (hook, hook)), two)
    assert torch.equal(sampled(run, family, model, (None, None)), plain)


def test_hook_keyframes_are_strengths(nodes, real, run, host, hooks):
    family = real.FAMILIES["sd3"]
    model, record = family.comfy(), run.record(family.patch(std=0.2), strength=0.8)

    def keyed(*frames: tuple[float, float]) -> Tensor:
        group = hooks.HookKeyframeGroup()
        for start, strength in frames:
            group.add(hooks.HookKeyframe(strength, start, guarantee_steps=0))
        hook = nodes["DMP_CreateHook"].execute(record).result[0].clone()
        hook.set_keyframes_on_hooks(group)
        return sampled(run, family, model, (hook, hook))

    def attached(**settings: Any) -> Tensor:
        own = run.record(record.loaded.patch, **settings)
        return sampled(run, family, host.attach(model, own), (None, None))

    assert torch.equal(keyed((0.0, 0.0)), sampled(run, family, model, (None, None)))
    torch.testing.assert_close(keyed((0.0, 0.5)), attached(strength=0.4))
    torch.testing.assert_close(keyed((0.0, 0.0), (0.4, 1.0)), attached(strength=0.8, start=0.4))


def test_what_cannot_be_hooked_is_told(nodes, real, run):
    family = real.FAMILIES["sd3"]
    masked = run.record(family.patch(), mask=torch.ones(1, 8, 8))
    with pytest.raises(PatchError, match="without a mask for a hook"):
        nodes["DMP_CreateHook"].execute(masked)
    other = run.record(real.FAMILIES["flux"].patch())
    hook = nodes["DMP_CreateHook"].execute(other).result[0]
    with pytest.raises(PatchError, match="base"):
        sampled(run, family, family.comfy(), (hook, None))
