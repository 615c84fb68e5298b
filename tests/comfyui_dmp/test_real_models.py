"""The patch in ComfyUI's real model classes: what it changes, and what it must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError, attach

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def sigmas_at(patcher: Any, *percents: float) -> Tensor:
    sampling = patcher.get_model_object("model_sampling")
    return torch.tensor([float(sampling.percent_to_sigma(p)) for p in percents])


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_twins_agree_without_a_patch(family, run):
    """The models of the two libraries are the same, or later comparisons would mean nothing."""
    compare_with_diffusers(family, family.comfy(), run, None)


@pytest.mark.parametrize("percents", [(0.3, 0.3), (0.1, 0.7)], ids=["equal", "unequal"])
def test_patch_acts_as_in_diffusers(family, run, host, percents):
    patch = family.patch(sites="all", std=0.2)
    patcher = host.attach(family.comfy(), run.record(patch, strength=0.7))
    compare_with_diffusers(family, patcher, run, patch, percents)


def compare_with_diffusers(family, patcher, run, patch, percents=(0.3, 0.7)) -> None:
    sigmas = sigmas_at(patcher, *percents)
    sampling, base = patcher.model.model_sampling, family.base
    ours = run.call(patcher, family, sigmas)
    x, text, pooled = family.inputs(len(sigmas))
    levels = sigmas.reshape(-1, *[1] * (x.dim() - 1))
    x = x * levels.clamp(max=15)
    timesteps = base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
    arguments = family.call(sampling.calculate_input(sigmas, x), timesteps, text, pooled)
    twin = family.diffusers()
    with torch.inference_mode():
        if patch is None:
            out = family.run(twin, arguments)
        else:
            plain = family.run(twin, arguments)
            with attach(twin, patch, strength=0.7):
                out = family.run(twin, arguments)
            assert (out - plain).norm() > 0.01 * plain.norm()
    theirs = sampling.calculate_denoised(sigmas, family.unpack(out, tuple(x.shape[2:])), x)
    noise = (ours - x) / levels
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (noise - (theirs - x) / levels).norm() < 1e-4 * noise.norm()


def test_zero_patch_and_strength_zero_are_bit_identical(family, run, host):
    patcher = family.comfy()
    plain = run.sample(patcher, family)
    zero = host.attach(patcher, run.record(family.patch(None, sites="all")))
    assert torch.equal(run.sample(zero, family), plain)
    off = host.attach(patcher, run.record(family.patch(sites="all"), strength=0.0))
    assert torch.equal(run.sample(off, family), plain)


def test_branches_do_not_mix(family, run, host):
    patcher = family.comfy()
    plain = run.sample(patcher, family)
    first = host.attach(patcher, run.record(family.patch(1)))
    second = host.attach(patcher, run.record(family.patch(2)))
    one, two = run.sample(first, family), run.sample(second, family)
    assert torch.equal(run.sample(patcher, family), plain)  # between
    assert not torch.equal(one, plain)
    assert not torch.equal(one, two)
    assert torch.equal(run.sample(first, family), one)
    assert torch.equal(run.sample(second, family), two)
    assert torch.equal(run.sample(patcher, family), plain)  # after
    assert hooks_on(patcher.model) == 0


def test_chained_patches_add(family, run, host):
    patcher, sigmas = family.comfy(), torch.tensor([0.5, 0.5])
    record = run.record(family.patch(1, std=0.1))
    twice = host.attach(host.attach(patcher, record), record)
    double = host.attach(patcher, run.record(record.loaded.patch, strength=2.0))
    torch.testing.assert_close(
        run.call(twice, family, sigmas), run.call(double, family, sigmas), atol=1e-4, rtol=1e-4
    )
    other = run.record(family.patch(2, std=0.1))
    ab = host.attach(host.attach(patcher, record), other)
    ba = host.attach(host.attach(patcher, other), record)
    both = run.call(ab, family, sigmas)
    torch.testing.assert_close(both, run.call(ba, family, sigmas), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, run.call(host.attach(patcher, other), family, sigmas))


@pytest.mark.parametrize(
    "options",
    [
        {"count": 3},
        {"cfg": 1.0},
        {"negative_tokens": 3},
        {"area": (4, 4, 2, 0)},
        {"steps": 4},
    ],
    ids=str,
)
def test_samplings(family, run, host, options):
    """Batches, one conditioning only, unequal lengths, areas: as the plain model does them."""
    if family.name == "pixart" and "area" in options:
        options = {"area": (40, 48, 16, 0)}
    if family.frames and "area" in options:
        options = {"area": (1, 4, 4, 0, 2, 0)}
    patcher = family.comfy()
    plain = run.sample(patcher, family, **options)
    record = run.record(family.patch(std=0.1, sites="all"))
    out = run.sample(host.attach(patcher, record), family, **options)
    assert out.isfinite().all()
    assert not torch.allclose(out, plain)
    zero = host.attach(patcher, run.record(family.patch(None)))
    assert torch.equal(run.sample(zero, family, **options), plain)


@pytest.mark.parametrize("size", [(16, 24), (9, 15)], ids=str)
def test_sizes(real, run, host, size):
    """Any size the host's model takes; transformers pad an odd one to whole tokens."""
    for name in {"sd15", "sd3", "flux", "qwen-image", "z-image"} & set(real.FAMILIES):
        family = real.FAMILIES[name]
        patcher = family.comfy()
        patched = host.attach(patcher, run.record(family.patch(sites="all")))
        sigmas = torch.tensor([0.5])
        plain = run.call(patcher, family, sigmas, size)
        assert not torch.allclose(run.call(patched, family, sigmas, size), plain)


def test_odd_size_uses_the_padded_grid(real, run, host):
    """A prompt in the last column must act on the last, incomplete column of tokens."""
    family = real.FAMILIES["flux"]
    patch = family.patch(None, sites=["double.0"], grid=(1, 8), gate="none")
    patch.pool("double.0").prompts[0, -1] = 5.0
    patcher = family.comfy()
    patched = host.attach(patcher, run.record(patch))
    sigmas = torch.tensor([0.5])
    seen = []
    block = patcher.model.diffusion_model.double_blocks[0]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["img"].clone()), with_kwargs=True
    )
    run.call(patcher, family, sigmas, (2, 15))
    run.call(patched, family, sigmas, (2, 15))
    handle.remove()
    difference = (seen[1] - seen[0]).abs().sum(-1)[0]
    assert difference.shape == (8,)
    assert difference[:7].max() == 0
    assert difference[7] > 1


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image", "krea2"])
def test_edits_patch_the_picture_and_not_the_reference(real, run, host, name):
    """FLUX Kontext and Qwen-Image-Edit append the tokens of reference pictures."""
    family = real.FAMILIES.get(name) or pytest.skip("this release of diffusers does not know it")
    patch = family.patch(sites="all", std=0.2)
    patcher = host.attach(family.comfy(), run.record(patch, strength=0.7))
    reference = real.noise(9, 2, family.channels, *family.frames, 4, 8)
    sigmas = torch.tensor([0.5, 0.5])
    method = {"ref_latents_method": "index"} if name == "krea2" else {}  # which has no usual one
    ours = run.call(patcher, family, sigmas, ref_latents=[reference], **method)
    x, text, pooled = family.inputs(2)
    x = x * 0.5
    arguments = family.call(x, sigmas * 1000, text, pooled)
    added = family.call(reference, sigmas * 1000, text, pooled)
    tokens = arguments["hidden_states"].shape[1]
    arguments["hidden_states"] = torch.cat(
        [arguments["hidden_states"], added["hidden_states"]], dim=1
    )
    if "img_ids" in added:
        ids = added["img_ids"].clone()
        ids[:, 0] = family.unet.get("ref_index_scale", 1)
        arguments["img_ids"] = torch.cat([arguments["img_ids"], ids])
    elif "position_ids" in added:
        ids = added["position_ids"][text.shape[1] :].clone()
        ids[:, 0] = 1
        arguments["position_ids"] = torch.cat([arguments["position_ids"], ids])
    else:
        both = zip(arguments["img_shapes"], added["img_shapes"], strict=True)
        arguments["img_shapes"] = [own + other for own, other in both]
    twin = family.diffusers()
    with torch.inference_mode(), attach(twin, patch, strength=0.7):
        out = twin(**arguments, return_dict=False)[0][:, :tokens]
    theirs = x - 0.5 * family.unpack(out, family.size)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_schedule_by_percent(family, run, host):
    """Outside its range a patch is exactly not there; a curve multiplies the strength."""
    patcher = family.comfy()
    patch = family.patch(std=0.1)
    half = host.attach(patcher, run.record(patch, start=0.2, end=0.5))
    full = host.attach(patcher, run.record(patch))
    for percent, acts in ((0.1, False), (0.3, True), (0.7, False)):
        sigmas = sigmas_at(patcher, percent, percent)
        reference = full if acts else patcher
        assert torch.equal(run.call(half, family, sigmas), run.call(reference, family, sigmas))
    both = sigmas_at(patcher, 0.3, 0.7)  # one item inside, one outside
    out, plain = run.call(half, family, both), run.call(patcher, family, both)
    torch.testing.assert_close(out[1], plain[1])
    assert not torch.allclose(out[0], plain[0])
    fade = host.attach(patcher, run.record(patch, curve=(0.0, 0.0, 1.0)))
    early = sigmas_at(patcher, 0.2, 0.2)
    assert torch.equal(run.call(fade, family, early), run.call(patcher, family, early))


def test_a_patch_of_a_part_of_the_timesteps_is_off_elsewhere(family, run, host):
    patcher = family.comfy()
    whole, part = family.patch(std=0.1), family.patch(timesteps=(0, 500))
    part.load_tensors(whole.tensors())
    full, half = (host.attach(patcher, run.record(patch)) for patch in (whole, part))
    acted = []
    for percent in (0.05, 0.95):
        sigmas = sigmas_at(patcher, percent, percent)
        at = host.timesteps_of(patcher.model.model_sampling, whole.base, sigmas)
        acted.append(bool((at < 500).all()))
        reference = full if acted[-1] else patcher
        assert torch.equal(run.call(half, family, sigmas), run.call(reference, family, sigmas))
    assert acted == [False, True]


def test_sites_and_temperature(family, run, host):
    patcher, sigmas = family.comfy(), torch.tensor([0.5])
    patch = family.patch()
    every = run.call(host.attach(patcher, run.record(patch)), family, sigmas)
    first = frozenset([next(iter(patch.sites))])
    for settings in ({"sites": first}, {"temperature": 5.0}):
        record = run.record(patch, **settings)
        assert not torch.allclose(run.call(host.attach(patcher, record), family, sigmas), every)
    none = run.record(patch, sites=frozenset())
    plain = run.call(patcher, family, sigmas)
    assert torch.equal(run.call(host.attach(patcher, none), family, sigmas), plain)


def test_copies_of_the_options_copy_no_weights(family, run, host):
    record = run.record(family.patch())
    patched = host.attach(family.comfy(), record)
    run.sample(patched, family)
    wrapper = patched.wrappers["apply_model"]["dmp"][0]
    assert copy.deepcopy(patched.wrappers)["apply_model"]["dmp"][0] is wrapper
    assert patched.clone().clone().wrappers["apply_model"]["dmp"][0] is wrapper
    assert wrapper.record is record
    assert not [x for x in _leaves(patched.model_options) if isinstance(x, (Tensor, nn.Module))]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def test_nothing_is_left_behind_by_an_exception(family, run, host):
    """An interrupt, or an error, in the middle of a call."""
    patcher = family.comfy()
    plain = run.sample(patcher, family)
    patched = host.attach(patcher, run.record(family.patch(sites="all")))
    last = patcher.model.diffusion_model.get_submodule(family.base.sites[-1].paths["ldm"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.sample(patched, family)
    handle.remove()
    assert hooks_on(patcher.model) == 0
    assert torch.equal(run.sample(patcher, family), plain)


def test_wrong_models_are_refused_by_name(real, run, host):
    sd15, sdxl = real.FAMILIES["sd15"], real.FAMILIES["sdxl"]
    with pytest.raises(PatchError, match=r"^test.*base comfy-sd15.*found one of base comfy-sdxl"):
        host.attach(sdxl.comfy(), run.record(sd15.patch()))
    other = sd15.comfy()
    other.model.diffusion_model.out = other.model.diffusion_model.input_blocks
    other.model.diffusion_model.time_embed = nn.Identity()
    with pytest.raises(PatchError, match=r"found UNetModel .*not supported"):
        host.attach(other, run.record(sd15.patch()))


def test_prepending_patches_are_refused(real, run, host):
    from dmp_common import Variant, bases, register_base

    base = register_base(bases.dit("comfy-dit", depth=2, width=32, patch_size=2))
    record = run.record(type(real.FAMILIES["sd15"].patch())(Variant.create(base, mix="prepend")))
    with pytest.raises(PatchError, match="expected a model of the patch's base comfy-dit"):
        host.attach(real.FAMILIES["sd15"].comfy(), record)


def test_other_prediction_types_are_refused(real, run, host):
    family = real.FAMILIES["sd15"]
    record = run.record(family.patch(prediction="v_prediction"))
    with pytest.raises(PatchError, match="prediction type v_prediction, found epsilon"):
        host.attach(family.comfy(), record)
