"""Patches while a generation samples: on the model it began with, and off whatever happens."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from a1111_dmp.conditions import Conditions
from a1111_dmp.session import Model, Session
from dmp_common import Base, Patch, PatchError, Schedule, attach
from dmp_common.attach.record import LoadedPatch, PatchRecord
from tests.a1111_dmp.ldm_shape import TINY, Unet, pair, run
from tests.tiny import FAMILIES


def record(patch: Patch | None = None, **settings: Any) -> PatchRecord:
    patch = patch or TINY.patch(1, sites="all")
    return PatchRecord(LoadedPatch(patch, Path("models/DMP/p.safetensors")), **settings)


def linear(base: Base, percent: float) -> float:
    return (1.0 - percent) * 999.0


class Host:
    """A host with two checkpoints, and what it tells."""

    def __init__(self) -> None:
        self.diffusers, self.unet = pair()
        self.model = Model(self.unet, "models/own.safetensors", "epsilon", linear)
        self.told: list[str] = []
        self.stopped = False

    @cached_property
    def other(self) -> Unet:
        """The model of the other checkpoint."""
        return pair(seed=1)[1]

    def load(self, unet: Unet, checkpoint: str, **changes: Any) -> None:
        self.model = Model(unet, f"models/{checkpoint}.safetensors", "epsilon", linear, **changes)

    def session(self, *records: PatchRecord) -> Session:
        session = Session(lambda: self.model, lambda: self.stopped, self.told.append)
        session.choose("accordion", records)
        return session


@pytest.fixture
def host() -> Host:
    return Host()


def hooks(*models: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for model in models for m in model.modules() for kind in kinds)


def test_ldm_shape_calculates_what_diffusers_does(host):
    torch.testing.assert_close(run(host.unet), run(host.diffusers))


@pytest.mark.parametrize("sites", ["encoder", "decoder", "all"])
def test_same_patch_gives_the_same_as_in_diffusers(host, sites):
    patch = TINY.patch(3, sites=sites)
    with host.session(record(patch, strength=0.8)):
        found = run(host.unet)
    plain = run(host.diffusers)
    with attach(host.diffusers, patch, strength=0.8):
        expected = run(host.diffusers)
    assert float((expected - plain).norm() / plain.norm()) > 0.01
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_zero_patch_strength_zero_and_afterwards_are_exactly_the_plain_model(host):
    plain = run(host.unet)
    for used in (record(TINY.patch(None)), record(strength=0.0)):
        with host.session(used):
            torch.testing.assert_close(run(host.unet), plain, rtol=0, atol=0)
    with host.session(record()):
        assert not run(host.unet).equal(plain)
    assert run(host.unet).equal(plain)
    assert hooks(host.unet) == 0


def test_settings_act_as_in_the_core(host):
    patch = TINY.patch(1, sites="all")
    settings = {"start": 0.2, "end": 0.7, "curve": (1.0, 0.5, 0.0)}
    times = (999.0, 700.0, 400.0, 100.0)
    with host.session(record(patch, strength=1.5, **settings)):
        found = run(host.unet, times)
    curve = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    schedule = Schedule.from_percent(0.2, 0.7, curve, lambda p: (1.0 - p) * 999.0)
    with attach(host.unet, patch, strength=1.5, schedule=schedule):
        expected = run(host.unet, times)
    assert found.equal(expected)
    plain = run(host.unet, times)
    assert found[0].equal(plain[0]) and found[3].equal(plain[3])
    assert not found[1].equal(plain[1])


def test_patches_from_all_places_add(host):
    one, two = record(TINY.patch(1)), record(TINY.patch(2), strength=0.5)
    session = host.session(one)
    session.choose("prompt", [two])
    with session:
        both = run(host.unet)
    with attach(host.unet, one.loaded.patch), attach(host.unet, two.loaded.patch, strength=0.5):
        assert run(host.unet).equal(both)
    session.choose("accordion", [])
    with session, torch.no_grad():
        only = run(host.unet)
    with attach(host.unet, two.loaded.patch, strength=0.5):
        assert run(host.unet).equal(only)


def test_both_passes_of_hires_fix_are_patched(host):
    patch = record()
    plain = [run(host.unet, size=size) for size in ((8, 8), (16, 8))]
    with host.session(patch) as session:
        found = [run(host.unet, size=size) for size in ((8, 8), (16, 8))]
        session.follow()
    for size, ours, before in zip(((8, 8), (16, 8)), found, plain, strict=True):
        assert not ours.equal(before)
        with attach(host.diffusers, patch.loaded.patch):
            torch.testing.assert_close(ours, run(host.diffusers, size=size))


def test_hires_prompt_exchanges_the_patches_in_the_midst(host):
    plain, session = run(host.unet), host.session()
    with session:
        assert run(host.unet).equal(plain)
        session.choose("prompt", [record()])
        assert not run(host.unet).equal(plain)
        session.choose("prompt", [])
        assert run(host.unet).equal(plain)


def test_a_refiner_of_another_module_is_left_alone(host):
    plain, refined = run(host.unet), run(host.other)
    with host.session(record()) as session:
        patched = run(host.unet)
        host.load(host.other, "refiner")
        session.follow()
        assert run(host.other).equal(refined)
        assert hooks(host.unet, host.other) == 0
        session.follow()
        host.load(host.unet, "own")
        session.follow()
        assert run(host.unet).equal(patched)
    assert run(host.unet).equal(plain)
    assert host.told == [
        "DMP: the model is refiner.safetensors now; the patches of the controls are for "
        "own.safetensors and do not act on it."
    ]


def test_a_refiner_in_the_same_module_is_left_alone(host):
    weights = {k: v.clone() for k, v in host.unet.state_dict().items()}
    refined = run(host.other)
    with host.session(record()) as session:
        patched = run(host.unet)
        host.unet.load_state_dict(host.other.state_dict())
        host.load(host.unet, "refiner")
        session.follow()
        assert run(host.unet).equal(refined)
        host.unet.load_state_dict(weights)
        host.load(host.unet, "own")
        session.follow()
        assert run(host.unet).equal(patched)


def test_own_checkpoint_loaded_again_into_another_module_is_patched(host):
    with host.session(record()) as session:
        patched = run(host.unet)
        again = pair()[1]
        host.load(again, "own")
        session.follow()
        assert run(again).equal(patched)
        assert hooks(host.unet) == 0
    assert hooks(again) == 0


def test_the_model_is_not_kept_alive_while_another_is_loaded(host):
    unet = Unet(TINY.model())
    seen = weakref.ref(unet)
    host.load(unet, "own")
    with host.session(record()) as session:
        run(unet)
        host.load(host.other, "refiner")
        del unet
        gc.collect()
        assert seen() is None
        session.follow()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_hooks_are_gone_after(host, error):
    plain = run(host.unet)
    session = host.session(record())

    def sample() -> None:
        with session:
            run(host.unet)
            raise error

    with pytest.raises(error):
        sample()
    assert hooks(host.unet) == 0
    assert not session.running
    assert run(host.unet).equal(plain)
    with session:
        assert not run(host.unet).equal(plain)


def test_hooks_are_gone_after_scripts_are_unloaded_in_the_midst(host):
    plain = run(host.unet)
    with host.session(record()) as session:
        session.close()
        assert run(host.unet).equal(plain)
        assert hooks(host.unet) == 0


def test_a_replaced_unet_is_told_of(host):
    host.load(host.unet, "own", replaced="engine")
    with host.session(record()) as session:
        assert hooks(host.unet) == 0
    assert "nothing was applied of p.safetensors" in session.unused
    assert "found it replaced by engine" in host.told[0]
    host.load(host.unet, "own")
    with session:
        run(host.unet)
    assert session.unused == ""


def test_compiled_calls_count(host):
    """Forge Neo compiles the model; the flag is what compiled code sets instead of counting."""
    with host.session(record()) as session:
        ((_, attachment),) = session._attachments
        attachment._hooks.compiled = True
    assert session.unused == ""


def test_a_model_whose_forward_is_replaced_is_told_of(host):
    host.unet.forward = lambda *args, **kwargs: torch.zeros(1)
    with host.session(record()) as session:
        run(host.unet)
    assert "the model was never called" in session.unused
    host.told.clear()
    host.stopped = True
    with session:
        pass
    assert (session.unused, host.told) == ("", [])


def nothing(host: Host) -> None:
    return


def v_model(host: Host) -> None:
    host.model = Model(host.unet, "models/v.safetensors", "v_prediction", linear)


@pytest.mark.parametrize(
    ("patch", "prepare", "says"),
    [
        (
            lambda: FAMILIES["sdxl"].patch(),
            nothing,
            r"DMP: p.safetensors: expected a model of the patch's base tiny-sdxl, found",
        ),
        (
            lambda: TINY.patch(),
            v_model,
            r"DMP: p.safetensors: expected a model with prediction type epsilon, found "
            r"v_prediction: load the model",
        ),
    ],
)
def test_a_patch_that_does_not_fit_fails_before_anything_is_sampled(
    host, patch: Callable[[], Patch], prepare, says
):
    prepare(host)
    session = host.session(record(), record(patch()))
    with pytest.raises(PatchError, match=says), session:
        pytest.fail("sampled")
    assert hooks(host.unet) == 0


def test_the_wrong_base_is_told_before_the_prediction_type_that_follows_from_it(host):
    v_model(host)
    says = r"DMP: p.safetensors: expected a model of the patch's base tiny-sdxl, found"
    with pytest.raises(PatchError, match=says), host.session(record(FAMILIES["sdxl"].patch())):
        pytest.fail("sampled")


def test_errors_kept_from_swallowing_callbacks_fail_the_sampling(host):
    session = host.session()
    session.fail("prompt", PatchError("expected that, found this: do so."))
    with pytest.raises(PatchError, match=r"^DMP: expected that, found this: do so\.$"), session:
        pytest.fail("sampled")
    session.choose("prompt", [record()])
    with session:
        run(host.unet)


def test_an_error_in_the_midst_fails_the_sampling_afterwards(host):
    session = host.session(record())

    def sample() -> None:
        with session:
            run(host.unet)
            with contextlib.suppress(PatchError):  # as the host does
                session.choose("prompt", [record(FAMILIES["sdxl"].patch())])

    with pytest.raises(
        PatchError, match="DMP: p.safetensors: expected a model of the patch's base"
    ):
        sample()
    assert hooks(host.unet) == 0


def test_many_generations_leave_nothing(host):
    patch, plain = record(), run(host.unet)
    session = host.session(patch)
    with session:
        patched = run(host.unet)
    for turn in range(40):
        if turn % 2:
            with session:
                assert run(host.unet).equal(patched)
        else:
            assert run(host.unet).equal(plain)
    assert hooks(host.unet) == 0
    cache = patch.loaded.patch.cache
    assert len(cache) <= 60


def test_a_host_without_a_word_for_predictions_is_believed(host):
    host.model = Model(host.unet, "models/own.safetensors", None, linear)
    with host.session(record()):
        run(host.unet)
    assert SimpleNamespace(**vars(host)).told == []


def guiding(**variant: Any) -> Patch:
    return TINY.patch(1, 0.2, **{"guidance": 4.0, **variant})


def parts_of_a_step(count: int, size: int) -> Tensor:
    """How a host hands the items of a step to the model: the conditional ones first."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, size, size, generator=generator)


def test_modulating_patches_are_those_of_diffusers(host):
    patch = TINY.patch(1, 0.2, mix="modulate")
    plain = run(host.unet)
    with host.session(record(patch, strength=0.8)):
        found = run(host.unet)
    with attach(host.diffusers, patch, strength=0.8):
        expected = run(host.diffusers)
    assert float((expected - plain).norm() / plain.norm()) > 0.01
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert run(host.unet).equal(plain)


@pytest.mark.parametrize("mix", ["add", "modulate"])
@pytest.mark.parametrize("calls", [(6,), (2, 2, 2), (4, 2), (3, 3)], ids=str)
def test_guidance_patches_act_on_the_conditional_items_of_a_step(host, mix, calls):
    """A step of four conditional items (AND in the prompt) and two unconditional ones."""
    times, text = torch.full((6,), 400.0), torch.ones(6, 3, 12)
    x = parts_of_a_step(6, 8)

    def step() -> Tensor:
        outs, place = [], 0
        for items in calls:
            own = slice(place, place + items)
            outs.append(host.unet(x[own], times[own], text[own]))
            place += items
        return torch.cat(outs)

    with torch.inference_mode():
        plain = step()
        patch = guiding(mix=mix)
        with attach(host.unet, patch):
            whole = step()
        with host.session(record(patch)) as session:
            for _ in range(2):
                session.conditions.step(6, 4)
                found = step()
    torch.testing.assert_close(found[:4], whole[:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[4:], plain[4:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[4:], plain[4:])
    assert hooks(host.unet) == 0


def test_forge_says_what_the_parts_of_a_call_are():
    conditions = Conditions()
    conditions.step(2, 2)
    x = torch.zeros(4, 4, 8, 8)
    for kinds, expected in (([1, 0], [0, 0, 1, 1]), ([0], [1, 1, 1, 1]), ([1], [0, 0, 0, 0])):
        conditions.begin(nn.Identity(), (x,), {"transformer_options": {"cond_or_uncond": kinds}})
        assert conditions(4).tolist() == [bool(value) for value in expected]
    assert conditions.pictures.tolist() == [0, 1, 2, 3]
    assert conditions(3) is None
    other = Conditions()
    other.begin(nn.Identity(), (), {"x": x})
    assert other(4) is None


def test_each_picture_of_a_batch_has_its_own_patches(host):
    """Also where a patch of all pictures acts beside them, and both kinds of items are one call."""
    one, two = record(TINY.patch(1)), record(TINY.patch(2), strength=0.5)
    everywhere = record(TINY.patch(3))
    times = (700.0,) * 3
    wanted = []
    for records in ([one], [two, one], []):
        with host.session(everywhere, *records):
            wanted.append(run(host.unet, times)[len(wanted)])
    session = host.session(everywhere)
    session.choose("prompt", [one], [two, one], [])
    with session:
        session.conditions.step(6, 3, [0, 1, 2, 0, 1, 2])
        found = run(host.unet, times), run(host.unet, times)
    for call in found:  # the conditional items, then the others
        torch.testing.assert_close(call, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    with session, pytest.raises(PatchError, match="each item of a call belongs to.*batch size to"):
        run(host.unet, times)
    session.choose("prompt", [one], [one])
    assert not session.mixed


def test_a_patch_of_the_prompt_follows_it_to_the_models_that_it_fits(host):
    tag, foreign = record(TINY.patch(1)), record(FAMILIES["sdxl"].patch())
    plain, other = run(host.unet), run(host.other)
    session = host.session()
    session.more_models = True
    session.choose("prompt", [tag, foreign])
    with session:
        assert not run(host.unet).equal(plain)
        host.load(host.other, "refiner")
        session.follow()
        assert not run(host.other).equal(other)
    assert run(host.unet).equal(plain) and run(host.other).equal(other)
    assert session.unused == ""
    first, second = host.told
    assert "patch's base tiny-sdxl" in first and "does not act on own.safetensors" in first
    assert "does not act on refiner.safetensors" in second
    session.choose("prompt", [foreign])
    with session:
        run(host.other)
    assert "no model of this generation fits" in session.unused
    session.more_models = False
    with pytest.raises(PatchError, match="patch's base tiny-sdxl"), session:
        pytest.fail("sampled")


def test_a_guidance_patch_says_use_cfg_1(host):
    session = host.session(record(guiding()))
    with session:
        run(host.unet)
    assert host.told == []
    session.scale = 7.0
    with session:
        run(host.unet)
        session.follow()
    assert len(host.told) == 1
    assert "set CFG Scale to 1" in host.told[0]


def test_a_repair_patch_says_on_which_model_it_is(host):
    patch = TINY.patch(1, mix="modulate")
    patch.metadata["dmp.use"] = '{"cheap": {"types": {"NF4": 95, "F16": 5}}}'
    with host.session(record(patch)):
        run(host.unet)
    assert "weights in NF4 (95%), F16 (5%), and this one has them in F32 (100%)" in host.told[0]


@pytest.mark.parametrize(("found", "said"), [(True, False), (False, True), (None, False)])
def test_another_noise_schedule_is_said_once(host, found, said):
    patch = TINY.patch(1, sites="all")
    patch.metadata["dmp.use"] = json.dumps({"zero_terminal_snr": True})
    host.load(host.unet, "own", zero_terminal_snr=found)
    with host.session(record(patch)) as session:
        session.follow()
        run(host.unet)
    note = "DMP: p.safetensors: the patch was trained on a noise schedule with zero"
    assert [text.startswith(note) for text in host.told] == [True] * said
