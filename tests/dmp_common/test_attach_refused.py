"""Attaching a patch: refused."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError, Schedule, Settings, attach
from dmp_common.bases.base import find_module
from tests.dmp_common.attaching import DIT, FLUX, SD15, close, make, site_shape, structure
from tests.tiny import FAMILIES


def test_block_called_outside_of_the_model(kind):
    model, patch = kind.model(), make(kind, sites="all")
    with attach(model, patch):
        for phase in range(2):
            for name, site in patch.sites.items():
                module = find_module(model, site.paths["diffusers"])
                with pytest.raises(PatchError, match=f"{name} was called outside"):
                    module(torch.zeros(1, 4, 4))
            if phase == 0:
                kind.run(model)  # its context must be gone afterwards


def test_patch_for_another_base(tiny):
    model = tiny.model()
    shape = structure(model)
    for other in FAMILIES.values():
        if other is tiny:
            continue
        with pytest.raises(PatchError) as error:
            attach(model, make(other))
        assert f"expected a model of the patch's base {other.base.name}" in str(error.value)
        assert f"found one of base {tiny.base.name}" in str(error.value)
    assert structure(model) == shape


def test_patch_for_no_base_of_this_model():
    with pytest.raises(PatchError, match=r"base tiny-dit, found Linear \(no module"):
        attach(nn.Linear(2, 2), make(DIT))
    for nothing in ("a string", None, 3, {}):
        with pytest.raises(PatchError, match="expected a diffusion model or pipeline"):
            attach(nothing, make(DIT))


@pytest.mark.parametrize("bad", [{"sites": ["nowhere"]}, {"strength": float("nan")}])
def test_refused_settings_leave_no_hook(kind, bad):
    model = kind.model()
    shape = structure(model)
    with pytest.raises(PatchError, match="expected"):
        attach(model, make(kind), **bad)
    assert structure(model) == shape


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": float("inf")},
        {"strength": 1e9},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(PatchError, match="expected a"):
        Settings(**settings)


def test_wrong_frequency_shift(tiny):
    model = tiny.model()
    shape = structure(model)
    own = tiny.base.frequency_shift
    with pytest.raises(PatchError, match=f"shift {1 - own:g}, found {own:g}"):
        attach(model, make(tiny, frequency_shift=1 - own))
    assert structure(model) == shape
    knowing = [m for m in model.modules() if hasattr(m, "downscale_freq_shift")]
    assert bool(knowing) is (tiny.base.times["diffusers"].projection is not None)
    if not knowing:  # Z-Image: the sinusoid is a function of the class, with shift 0
        return
    for module in knowing:
        module.downscale_freq_shift = 1 - own
    with pytest.raises(PatchError, match="frequency shift"):
        attach(model, make(tiny))
    with attach(model, make(tiny, frequency_shift=1 - own)):
        tiny.run(model)


def test_pipeline_with_another_prediction_type():
    def pipe(scheduler):
        return SimpleNamespace(unet=SD15.model(), scheduler=scheduler)

    epsilon = diffusers.DDIMScheduler()
    v = diffusers.DDIMScheduler(prediction_type="v_prediction")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    attach(pipe(epsilon), make(SD15))
    attach(pipe(v), make(SD15, prediction="v_prediction"))
    for scheduler, found in ((v, "v_prediction"), (flow, "flow")):
        with pytest.raises(PatchError, match=f"type epsilon, found {found}"):
            attach(pipe(scheduler), make(SD15))
    with pytest.raises(PatchError, match="type v_prediction, found epsilon"):
        attach(pipe(epsilon), make(SD15, prediction="v_prediction"))
    # A bare model does not know; the caller does.
    attach(pipe(v).unet, make(SD15))

    def transformer(scheduler):
        return SimpleNamespace(transformer=FLUX.model(), scheduler=scheduler)

    attach(transformer(flow), make(FLUX))
    if "use_flow_sigmas" in inspect.signature(diffusers.DPMSolverMultistepScheduler).parameters:
        solver = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
        attach(transformer(solver), make(FLUX))
    with pytest.raises(PatchError, match="type flow, found epsilon"):
        attach(transformer(epsilon), make(FLUX))


def test_a_real_pipeline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4
        ).eval()
    model = DIT.model()
    model.register_to_config(out_channels=4)  # None would be resolved in a released model's file
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    patch = make(DIT)

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipe(
                [1, 2],
                guidance_scale=1.0,
                generator=generator,
                num_inference_steps=3,
                output_type="np",
            ).images
        )

    base = picture()
    with attach(pipe, patch) as attachment:
        patched = picture()
        assert attachment.calls == 3
    with attach(pipe, patch, schedule=Schedule(first=400.0)) as attachment:
        late = picture()
    assert torch.equal(picture(), base)
    assert not torch.equal(patched, base)
    assert not torch.equal(late, base)
    assert not torch.equal(late, patched)


def test_shapes_that_cannot_be_a_site(kind):
    patch = make(kind, sites="all")
    e = torch.randn(2, kind.base.embedding)
    context = patch.prepare(e, (8, 8))
    name, site = next(iter(patch.sites.items()))
    if patch.base.layout == "map":
        good, wrong = (2, site.width, 8, 8), [(2, site.width - 1, 8, 8), (2, site.width, 8)]
    else:
        good = site_shape(patch.base, site, 2)
        tokens = good[1]
        wrong = [(2, tokens - 1, site.width), (2, tokens, site.width + 1), (2, tokens, 4, 4)]
        if not patch.base.shared:
            wrong.append((2, tokens + 1, site.width))
    assert context.add(name, torch.zeros(good)).any()
    for shape in wrong:
        with pytest.raises(PatchError, match=f"site {name} expected an input of shape"):
            context.add(name, torch.zeros(shape))
    with pytest.raises(PatchError, match="expected a batch of 2 items"):
        context.add(name, torch.zeros(3, *good[1:]))
    with pytest.raises(PatchError, match=r"time embedding \(B, "):
        patch.prepare(torch.zeros(2, kind.base.embedding + 1), (8, 8))
    with pytest.raises(PatchError, match="expected a time embedding"):
        patch.prepare(torch.zeros(kind.base.embedding), (8, 8))
    with pytest.raises(PatchError, match="needs the timesteps of the call"):
        patch.prepare(e, (8, 8), Settings(schedule=Schedule(first=3.0)))
    with pytest.raises(PatchError, match="expected sites of this patch"):
        patch.prepare(e, (8, 8), Settings(sites=frozenset(["nowhere"])))
    if patch.base.layout == "tokens":
        with pytest.raises(PatchError, match="size of the latent"):
            patch.prepare(e, None).add(name, torch.zeros(good))


def test_one_time_embedding_serves_a_whole_batch(kind):
    """Hosts may give one row for all items."""
    patch = make(kind)
    e = torch.randn(1, kind.base.embedding)
    name, site = next(iter(patch.sites.items()))
    shape = site_shape(patch.base, site, 3)
    x = torch.randn(shape)
    one = patch.prepare(e, (8, 8)).add(name, x)
    assert close(one, patch.prepare(e.expand(3, -1), (8, 8)).add(name, x), 1e-6)
    assert not close(one, x, 1e-2)


def test_context_changes_nothing_in_place(kind):
    patch = make(kind, sites="all")
    context = patch.prepare(torch.randn(2, kind.base.embedding), (8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.strength = 2.0
    for name, site in patch.sites.items():
        x = torch.randn(site_shape(patch.base, site, 2))
        if patch.base.layout == "map":
            x = torch.randn(2, site.width + 3, 8, 8)  # with channels of a skip connection
        kept = x.clone()
        first = context.add(name, x)
        assert torch.equal(x, kept)
        assert first.data_ptr() != x.data_ptr()
        assert torch.equal(context.add(name, x), first)
    inactive = patch.prepare(
        torch.randn(2, kind.base.embedding), (8, 8), Settings(sites=frozenset([name]))
    )
    other = next(iter(patch.sites))
    assert inactive.add(other, x) is x
    assert inactive.add("no site of the patch", x) is x
