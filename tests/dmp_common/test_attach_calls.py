"""Attaching a patch: what belongs to one call is seen by no other."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dmp_common as dmp
from dmp_common import Patch, PatchError, Schedule, attach, attached, detach
from dmp_common.attach.field import Field, FieldCache, Remembered
from tests.dmp_common.attaching import (
    DIT,
    FLUX,
    REPRESENTATIVES,
    SD15,
    alone,
    checkpoint,
    close,
    gradients,
    make,
    some,
    structure,
)
from tests.tiny import FAMILIES


def in_threads(*works: Callable[[], None]) -> None:
    """Runs all at once; what one raises is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@some(*REPRESENTATIVES)
def test_one_model_called_from_threads(tiny):
    model, patch = tiny.model(), make(tiny)
    with attach(model, patch), torch.no_grad():
        expected = {t: tiny.run(model, [t, t]) for t in (10.0, 300.0, 600.0, 900.0)}

        def work(t: float) -> Callable[[], None]:
            def calls() -> None:
                with torch.no_grad():
                    for _ in range(25):
                        assert torch.equal(tiny.run(model, [t, t]), expected[t])

            return calls

        in_threads(*map(work, expected))


@some(SD15, DIT)
def test_one_patch_on_two_models_in_threads_with_a_small_cache(tiny):
    patch = make(tiny)
    models = [tiny.model(seed) for seed in (0, 1)]
    steps = (10.0, 300.0, 600.0)
    expected = []
    for model in models:
        with attach(model, copy.deepcopy(patch)), torch.no_grad():
            expected.append([tiny.run(model, [t, t]) for t in steps])
    with attach(models[0], patch), torch.no_grad():
        tiny.run(models[0])
    patch.cache.limit = patch.cache.bytes * 3 // 2  # holds the fields of one call, not of two
    with attach(models[0], patch), attach(models[1], patch):

        def work(index: int) -> Callable[[], None]:
            def calls() -> None:
                with torch.no_grad():
                    for turn in range(30):
                        step = turn % len(steps)
                        found = tiny.run(models[index], [steps[step]] * 2)
                        assert torch.equal(found, expected[index][step])

            return calls

        in_threads(work(0), work(1))
    assert patch.cache.bytes == sum(kept.nbytes for kept in patch.cache.values())
    assert patch.cache.bytes <= patch.cache.limit


def test_the_cache_counts_a_key_once_that_is_put_twice():
    cache = FieldCache(1000)
    for size in (10, 20, 5):
        kept = Remembered(torch.zeros(size))  # 4 bytes each
        cache.put("key", kept)
        assert cache.bytes == 4 * size
        for width in (3, 7):
            cache.add("key", kept, "place", Field(torch.zeros(width)))
            assert cache.bytes == kept.nbytes == 4 * (size + width)
    cache.add("key", Remembered(torch.zeros(1)), "place", Field(torch.zeros(1)))  # was evicted
    assert cache.bytes == 4 * (5 + 7)
    cache.put("other", Remembered(torch.zeros(245)))
    assert list(cache) == ["other"]
    assert cache.bytes == 980
    cache.put("large", Remembered(torch.zeros(251)))  # does not fit at all, and displaces nothing
    assert list(cache) == ["other"]


def test_fields_that_cannot_be_stored_all_are_not_stored():
    model, patch = DIT.model(), make(DIT, grid=5)  # three fields of (1, 16, 32), resized
    with attach(model, patch), torch.no_grad():
        expected = DIT.run(model, [10.0, 10.0])
        weights, field = 3 * 25 * 4, 16 * 32 * 4
        assert patch.cache.bytes == weights + 3 * field
        patch.cache.clear()
        patch.cache.limit = weights + 2 * field
        for _ in range(2):
            assert torch.equal(DIT.run(model, [10.0, 10.0]), expected)
            assert patch.cache.bytes == weights


def test_a_copied_model_is_patched_like_the_original_and_independent(tiny):
    model, patch = tiny.model(), make(tiny, sites="all")
    base, shape = tiny.run(model), structure(model)
    with attach(model, patch, strength=0.7) as attachment, torch.no_grad():
        expected = tiny.run(model)
        other = copy.deepcopy(model)
        assert torch.equal(tiny.run(other), expected)
        (own,) = attached(other)
        assert own != attachment
        own.strength = 0.2
        own.patch.gate.bias.add_(torch.linspace(0, 3, len(own.patch.gate.bias)))
        assert not close(tiny.run(other), expected, 1e-4)
        assert torch.equal(tiny.run(model), expected)
        attachment.enabled = False
        assert not torch.equal(tiny.run(other), base)
    assert structure(model) == shape
    assert detach(other) == 1
    assert attached(other) == []
    assert torch.equal(tiny.run(other), base)
    for module in other.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_a_copied_pipeline_and_a_lost_handle():
    pipe = diffusers.DiTPipeline(
        DIT.model(),
        diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        diffusers.DDIMScheduler(),
    )
    base = DIT.run(pipe.transformer)
    attach(pipe, make(DIT, 1))
    attach(pipe, make(DIT, 2))
    expected = DIT.run(pipe.transformer)
    other = copy.deepcopy(pipe)
    assert torch.equal(DIT.run(other.transformer), expected)
    assert len(attached(other)) == len(attached(pipe)) == 2
    assert [a.patch.variant for a in attached(pipe)] == [make(DIT).variant] * 2
    assert detach(pipe) == 2
    assert detach(pipe) == 0
    assert torch.equal(DIT.run(pipe.transformer), base)
    assert torch.equal(DIT.run(other.transformer), expected)
    detach(other)
    assert torch.equal(DIT.run(other.transformer), base)


@some(DIT)
def test_a_copied_block_belongs_to_the_calls_of_its_model(tiny):
    """PEFT puts copies of modules in the place of the modules themselves."""
    model, patch = tiny.model(), make(tiny, sites="all")
    base, expected = tiny.run(model), alone(tiny, patch)
    attachment = attach(model, patch)
    model.transformer_blocks[1] = copy.deepcopy(model.transformer_blocks[1])
    assert close(tiny.run(model), expected, 1e-6)
    attachment.remove()
    assert torch.equal(tiny.run(model), base)


@some(*REPRESENTATIVES)
def test_pickling_a_patched_model_is_refused(tiny):
    model = tiny.model()
    with attach(model, make(tiny)):
        with pytest.raises(PatchError, match=r"model without attached patches to pickle.*remove"):
            pickle.dumps(model)
        model.state_dict()
    pickle.loads(pickle.dumps(model))


CACHES = {
    "FirstBlockCacheConfig": {"threshold": 1e3},  # skips all but the first block
    "MagCacheConfig": {"num_inference_steps": 4, "mag_ratios": [1.0] * 4, "retention_ratio": 0.0},
    "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 1},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "current_timestep_callback": lambda: 500,
    },
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", CACHES)
def test_block_caches_of_diffusers(kind, when):
    """A skipped block gets no prompts: what runs is the plain cache on a patched model.

    The restatement puts the prompts into the blocks themselves, where a cache cannot skip them
    without the block.
    """
    if not hasattr(diffusers, kind):
        pytest.skip(f"this release of diffusers has no {kind}")
    config = getattr(diffusers, kind)(**CACHES[kind])
    patch = make(FLUX, sites="all")
    steps = [[900.0, 900.0], [890.0, 890.0], [880.0, 880.0], [870.0, 870.0]]
    plain = [FLUX.run(FLUX.model(), step) for step in steps]

    def outputs(model: nn.Module) -> list[Tensor]:
        found = []
        for step in steps:
            with torch.no_grad(), model.cache_context("cond"):
                found.append(FLUX.run(model, step))
        return found

    restated = FLUX.model()
    with attach(restated, patch) as attachment:
        rewrite_blocks(restated)
        attachment._hooks.sites.clear()  # they would find the new place by themselves
        restated.enable_cache(config)
        expected = outputs(restated)
    model = FLUX.model()
    if when == "before":
        model.enable_cache(config)
    with attach(model, patch):
        if when == "after":
            model.enable_cache(config)
        found = outputs(model)
        assert all(close(a, b, 1e-5) for a, b in zip(found, expected, strict=True))
        assert not close(found[0], plain[0], 1e-2)
    model.disable_cache()
    with torch.no_grad():
        assert torch.equal(FLUX.run(model, steps[0]), plain[0])


def rewrite_blocks(model: nn.Module) -> None:
    """Moves the hooks of each block into its forward."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        hooks, forward = list(block._forward_pre_hooks.values()), block.forward
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()

        def inside(*args, hooks=hooks, forward=forward, block=block, **kwargs):
            for hook in hooks:
                args, kwargs = hook(block, args, kwargs)
            return forward(*args, **kwargs)

        block.forward = inside


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp
@some(SD15, DIT, FAMILIES["sd3"])
def test_derivatives_by_the_timestep(tiny):
    """Forward-mode AD, jvp and vmap, with a schedule and after the fields are remembered."""
    model, patch = tiny.model(), make(tiny)
    schedule = Schedule(first=990.0, curve=((0.0, 0.2), (1000.0, 1.5)))
    inputs = tiny.inputs(torch.tensor([300.0]), (8, 8), torch.float32, 1)

    def output(t: Tensor) -> Tensor:
        return model(**{**inputs, "timestep": t.reshape(1)}, return_dict=False)[0]

    step = 0.05
    attention = pytest.importorskip("torch.nn.attention")
    maths = attention.sdpa_kernel(attention.SDPBackend.MATH)  # others have no forward-mode AD
    with attach(model, patch, schedule=schedule), torch.no_grad(), maths:
        for t in (300.0, 700.0):
            at = torch.tensor(t)
            value = output(at)  # remembered from here on
            slope = (output(at + step) - output(at - step)) / (2 * step)
            found, tangent = torch.func.jvp(output, (at,), (torch.ones(()),))
            assert close(found, value, 1e-5)
            assert (tangent - slope).norm() < 0.02 * slope.norm()
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(at, torch.full((), 2.0))
                tangent2 = torch.autograd.forward_ad.unpack_dual(output(dual)).tangent
            assert close(tangent2, 2 * tangent, 1e-4)
        many = torch.tensor([300.0, 700.0, 995.0])
        mapped = torch.func.vmap(output)(many)
        for t, each in zip(many, mapped, strict=True):
            assert close(each, output(t), 1e-5)


@some(*REPRESENTATIVES)
@pytest.mark.parametrize("change", ["remove", "another", "both"])
def test_backward_of_a_checkpointed_model_after_a_change(tiny, change):
    """Recomputation meets the patches of its own forward, or says that it cannot."""
    model, patch = tiny.model(), make(tiny, sites="all")
    expected = gradients(tiny, model, patch)
    checkpoint(model)
    patch.zero_grad(set_to_none=True)
    first = attach(model, patch)
    loss = tiny.run(model).square().mean()
    if change != "another":
        first.remove()
    if change != "remove":
        attach(model, make(tiny, 5))
    with pytest.raises(PatchError, match="backward"):
        loss.backward()
    detach(model)
    with attach(model, patch):
        patch.zero_grad(set_to_none=True)
        tiny.run(model).square().mean().backward()
        for name, parameter in patch.named_parameters():
            assert close(parameter.grad, expected[f"0.{name}"], 1e-6), name


def test_dials_turn_between_calls(kind):
    model, patch = kind.model(), make(kind)
    base = kind.run(model)
    with attach(model, patch) as attachment, torch.no_grad():
        whole = kind.run(model)
        attachment.strength = 0.5
        half = kind.run(model)
        attachment.enabled = False
        assert torch.equal(kind.run(model), base)
        attachment.enabled = True
        assert torch.equal(kind.run(model), half)
        attachment.strength = 1.0
        assert torch.equal(kind.run(model), whole)
        attachment.schedule = [(0.0, 0.5), (1.0, 0.5)]
        assert close(kind.run(model), half, 1e-5)
        attachment.schedule = Schedule(first=-1.0)
        assert torch.equal(kind.run(model), base)
        attachment.schedule = None
        assert torch.equal(kind.run(model), whole)
        with pytest.raises(PatchError, match="finite strength"):
            attachment.strength = float("nan")
        assert attachment.strength == 1.0
        assert attachment.active
        assert repr(attachment).endswith(f"for {kind.base.name}, strength 1, active>")
    assert not attachment.active
    assert repr(attachment).endswith("removed>")


def test_strength_of_single_sites(kind):
    model, patch = kind.model(), make(kind, sites="all")
    names = list(patch.sites)
    with torch.no_grad():
        scaled = copy.deepcopy(patch)
        scaled.pool(names[1]).prompts.mul_(0.25)
        scaled.pool(names[-1]).prompts.zero_()
        expected = alone(kind, scaled)
        with attach(model, patch, sites={names[1]: 0.25, names[-1]: 0.0}) as attachment:
            assert close(kind.run(model), expected, 1e-5)
            assert attachment.settings.sites is None
        with pytest.raises(PatchError, match=r"expected sites of this patch .*, found nowhere"):
            attach(model, patch, sites={"nowhere": 0.5})
        with pytest.raises(PatchError, match=f"finite strength of site {names[0]}"):
            attach(model, patch, sites={names[0]: float("inf")})
    assert attached(model) == []


def test_settings_as_one_object_or_one_by_one():
    model, patch = DIT.model(), make(DIT)
    settings = dmp.Settings(strength=0.3)
    with attach(model, patch, settings) as attachment:
        assert attachment.settings is settings
    with pytest.raises(PatchError, match="either settings or strength"):
        attach(model, patch, settings, strength=0.3)


@some(SD15)
def test_schedulers_with_other_timesteps(tiny):
    """EDM's c_noise is no timestep: a schedule would act somewhere else than it says."""

    def pipe(scheduler: object) -> SimpleNamespace:
        return SimpleNamespace(unet=tiny.model(), scheduler=scheduler)

    whole, part = make(tiny), make(tiny, timesteps=(0, 500))
    edm, ipndm = diffusers.EDMEulerScheduler(), diffusers.IPNDMScheduler()
    for scheduler in (edm, ipndm):
        attachment = attach(pipe(scheduler), whole)
        name = type(scheduler).__name__
        with pytest.raises(PatchError, match=f"counts timesteps from 1000.*found {name}"):
            attachment.schedule = Schedule(first=500.0)
        with pytest.raises(PatchError, match=f"found {name}"):
            attach(pipe(scheduler), part)
    attach(pipe(diffusers.EulerDiscreteScheduler()), part)
    # A model alone cannot tell, but a negative timestep can.
    model = tiny.model()
    with attach(model, part), torch.no_grad(), pytest.raises(PatchError, match=r"found -1.5"):
        tiny.run(model, [-1.5, -1.5])


def test_a_patch_is_shared_by_models_with_what_it_remembers():
    patch = make(DIT)
    models = [DIT.model(seed) for seed in (0, 1)]
    with attach(models[0], patch) as one, attach(models[1], patch) as two, torch.no_grad():
        DIT.run(models[0])
        before = patch.cache.bytes
        assert before > 0
        DIT.run(models[0])
        assert patch.cache.bytes == before
        assert one.patch is two.patch is patch


def test_eq_3_stands_whole_in_the_patch(kind):
    """`Patch.forward` is the formula; what models get is the same."""
    patch = make(kind, sites="all")
    e = torch.randn(3, kind.base.embedding)
    if patch.base.layout == "tokens":
        pytest.skip("the formula is written for feature maps")
    for name, site in patch.sites.items():
        x = torch.randn(3, site.width, 8 // site.stride, 8 // site.stride)
        found = patch.prepare(e, (8, 8), dmp.Settings(strength=0.6)).add(name, x)
        assert close(found, patch(x, name, e, 0.6), 1e-6)
        patch.scale_for_learning()
    assert isinstance(Patch.create(kind.base), Patch)
