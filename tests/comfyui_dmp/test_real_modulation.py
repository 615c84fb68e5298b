"""Modulating and guidance patches in ComfyUI's real model classes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError, attach

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def modulating(family: Any, seed: int | None = 0, std: float = 0.05, **variant: Any) -> Any:
    """A patch that scales and shifts every output of a family.

    Larger values than these bring layers near 0 in front of a norm, which makes errors of rounding
    large.
    """
    largest = list(family.base.output_sets)[-1]
    return family.patch(seed, std, **{"mix": "modulate", "sites": largest, **variant})


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def in_diffusers(family: Any, patcher: Any, sigmas: Tensor, patches: list[Any], **used: Any):
    """The denoised latents of the diffusers twin with patches, for `running.call`'s inputs."""
    sampling, base = patcher.model.model_sampling, family.base
    x, text, pooled = family.inputs(len(sigmas))
    x = x * sigmas.reshape(-1, *[1] * (x.dim() - 1)).clamp(max=15)
    timesteps = base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
    arguments = family.call(sampling.calculate_input(sigmas, x), timesteps, text, pooled)
    twin = family.diffusers()
    with torch.inference_mode():
        attachments = [attach(twin, patch, **used) for patch in patches]
        out = family.run(twin, arguments)
        for attachment in attachments:
            attachment.remove()
    return sampling.calculate_denoised(sigmas, family.unpack(out, tuple(x.shape[2:])), x)


@pytest.mark.parametrize("percents", [(0.3, 0.3), (0.1, 0.7)], ids=["equal", "unequal"])
def test_modulation_acts_as_in_diffusers(family, run, host, percents):
    plain = family.comfy()
    patches = [modulating(family, 1), modulating(family, 2)]
    patched = plain
    for patch in patches:
        patched = host.attach(patched, run.record(patch, strength=0.7))
    sampling = plain.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.percent_to_sigma(p)) for p in percents])
    ours, base = run.call(patched, family, sigmas), run.call(plain, family, sigmas)
    theirs = in_diffusers(family, plain, sigmas, patches, strength=0.7)
    assert (ours - base).norm() > 0.01 * base.norm()
    assert (ours - theirs).norm() < 2e-5 * theirs.norm()
    assert hooks_on(plain.model) == 0
    assert torch.equal(run.call(plain, family, sigmas), base)


def test_zero_modulation_and_strength_zero_are_bit_identical(family, run, host):
    patcher = family.comfy()
    plain = run.sample(patcher, family)
    zero = host.attach(patcher, run.record(modulating(family, None)))
    assert torch.equal(run.sample(zero, family), plain)
    off = host.attach(patcher, run.record(modulating(family), strength=0.0))
    assert torch.equal(run.sample(off, family), plain)


def test_modulation_leaves_nothing_behind(real, run, host):
    """Not in other branches, not after an interrupt, and in the order of attaching."""
    family = real.FAMILIES["sd3"]
    patcher = family.comfy()
    plain = run.sample(patcher, family)
    one, two = (run.record(modulating(family, seed)) for seed in (1, 2))
    first, second = host.attach(patcher, one), host.attach(patcher, two)
    assert torch.equal(run.sample(first, family), seen := run.sample(first, family))
    assert not torch.equal(run.sample(second, family), seen)
    assert torch.equal(run.sample(patcher, family), plain)
    ab, ba = host.attach(first, two), host.attach(second, one)
    assert not torch.allclose(run.sample(ab, family), run.sample(ba, family))
    last = patcher.model.diffusion_model.get_submodule(family.base.outputs[-1].paths["ldm"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.sample(ab, family)
    handle.remove()
    assert hooks_on(patcher.model) == 0
    assert torch.equal(run.sample(patcher, family), plain)


def test_settings_of_a_modulating_patch(real, run, host):
    family = real.FAMILIES["sd15"]
    patcher, patch = family.comfy(), modulating(family)
    sigmas = torch.tensor([2.0, 2.0])
    plain = run.call(patcher, family, sigmas)
    full = run.call(host.attach(patcher, run.record(patch)), family, sigmas)
    chosen = frozenset(list(patch.sites)[:3])
    for settings in ({"sites": chosen}, {"strength": 0.5}):
        out = run.call(host.attach(patcher, run.record(patch, **settings)), family, sigmas)
        assert not torch.allclose(out, full)
        assert not torch.allclose(out, plain)
    late = host.attach(patcher, run.record(patch, start=0.9))
    assert torch.equal(run.call(late, family, sigmas), plain)
    half = host.attach(family.comfy(dtype=torch.bfloat16), run.record(patch))
    assert run.call(half, family, sigmas).isfinite().all()


def test_modulation_and_compiling_exclude_each_other(real, run, host):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    family = real.FAMILIES["sd15"]
    patched = host.attach(family.comfy(), run.record(modulating(family)))
    set_torch_compile_wrapper(patched, backend="eager")
    with pytest.raises(PatchError, match="remove the compile node"):
        run.call(patched, family, torch.tensor([2.0]))
    assert hooks_on(patched.model) == 0


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_guidance_patches_act_on_conditional_items_alone(family, run, host, mix, caplog):
    """As the whole patch on these items, and as the plain model on the others."""
    variant = {"mix": "modulate"} if mix == "modulate" else {"sites": "all"}
    guiding = family.patch(0, 0.2, guidance=4.0, **variant)
    patcher = family.comfy()
    patched = host.attach(patcher, run.record(guiding))
    sampling = patcher.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.percent_to_sigma(0.4))] * 2)
    plain = run.call(patcher, family, sigmas)
    whole = run.call(patched, family, sigmas)  # no word about conditions: all are conditional
    assert not torch.allclose(whole[0], plain[0])
    assert caplog.records == []
    for kinds, acting in (([0, 1], 0), ([1, 0], 1)):
        patched.model_options["transformer_options"]["cond_or_uncond"] = kinds
        with caplog.at_level(logging.WARNING):
            out = run.call(patched, family, sigmas)
        torch.testing.assert_close(out[acting], whole[acting], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out[1 - acting], plain[1 - acting], atol=1e-4, rtol=1e-4)
    assert "set CFG to 1" in caplog.text
    patched.model_options["transformer_options"]["cond_or_uncond"] = [1]
    assert torch.equal(run.call(patched, family, sigmas), plain)


def test_guidance_says_use_cfg_1_once_a_sampling(real, run, host, caplog):
    family = real.FAMILIES["sd15"]
    patched = host.attach(family.comfy(), run.record(family.patch(guidance=4.0)))
    with caplog.at_level(logging.WARNING):
        run.sample(patched, family, cfg=1.0)
        assert caplog.records == []
        run.sample(patched, family, cfg=5.0, steps=3)
        run.sample(patched, family, cfg=5.0)
    said = [record for record in caplog.records if "set CFG to 1" in record.message]
    assert len(said) == 2


@pytest.mark.parametrize("first", ["repair", "guidance"])
def test_repair_and_guidance_stack_in_either_order(real, run, host, first):
    """Guidance on the conditional item alone, the repair on both."""
    family = real.FAMILIES["sd3"]
    repair, guidance = modulating(family, 1), family.patch(2, 0.2, guidance=4.0)
    patcher = family.comfy()
    sigmas = torch.tensor([0.4, 0.4])
    both = in_diffusers(family, patcher, sigmas, [repair, guidance])
    alone = in_diffusers(family, patcher, sigmas, [repair])
    order = [repair, guidance] if first == "repair" else [guidance, repair]
    patched = patcher
    for patch in order:
        patched = host.attach(patched, run.record(patch))
    patched.model_options["transformer_options"]["cond_or_uncond"] = [1, 0]
    out = run.call(patched, family, sigmas)
    torch.testing.assert_close(out[0], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[1], both[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], alone[0], atol=1e-3)
