"""Videos in ComfyUI's real Wan: frames with timesteps of their own, and references beside them."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmp_common import PatchError, attach

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def family(real: Any) -> Any:
    if "wan22" not in real.FAMILIES:
        pytest.skip("this release of diffusers does not know it")
    return real.FAMILIES["wan22"]


ADD, MODULATE = {"sites": "all"}, {"mix": "modulate", "sites": "modulated"}


@pytest.mark.parametrize(
    ("variant", "compiled"),
    [(ADD, False), (ADD, True), (MODULATE, False)],
    ids=["add", "add, compiled", "modulate"],
)
def test_a_clean_frame_has_its_own_timestep(family, run, host, variant, compiled):
    """TI2V-5B keeps the first frame, whose mask is 0; diffusers gives it a timestep a token."""
    patch = family.patch(std=0.2, **variant)
    plain, sigmas = family.comfy(), torch.tensor([0.9, 0.4])
    mask = torch.ones(2, 1, 2, 16, 8)
    mask[:, :, 0] = 0.0
    patcher = host.attach(plain, run.record(patch, strength=0.7))
    if compiled:
        denoiser = patcher.model.diffusion_model
        patcher.model.diffusion_model = torch.compile(denoiser, backend="eager")
    ours = run.call(patcher, family, sigmas, denoise_mask=mask)
    x, text, _ = family.inputs(2)
    levels = sigmas.reshape(-1, 1, 1, 1, 1)
    times = torch.tensor([[0.0, 900.0], [0.0, 400.0]]).repeat_interleave(32, dim=1)
    twin = family.diffusers()
    with torch.inference_mode(), attach(twin, patch, strength=0.7):
        out = family.run(twin, family.call(x * levels, times, text, text))
    theirs = x * levels - out * levels
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (ours - run.call(plain, family, sigmas, denoise_mask=mask)).norm() > 0.01 * ours.norm()


def test_references_beside_the_frames_are_refused(family, run, host):
    patcher = host.attach(family.comfy(), run.record(family.patch()))
    for name, value in (
        ("time_dim_concat", torch.zeros(1, 48, 1, 16, 8)),
        ("context_latents", [torch.zeros(1, 48, 1, 16, 8)]),
    ):
        with pytest.raises(PatchError, match=f"references .{name}. beside them"):
            run.call(patcher, family, torch.tensor([0.5]), **{name: value})


@pytest.mark.parametrize(("expert", "said"), [("low", 1), ("high", 0)])
def test_a_patch_on_the_other_expert_is_said_once_a_sampling(
    family, run, host, caplog, expert, said
):
    patcher = host.attach(family.comfy(), run.record(family.patch(expert=expert)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run.sample(patcher, family, steps=1, cfg=1.0)
    texts = [r.getMessage() for r in caplog.records if "expert for low noise" in r.getMessage()]
    assert len(texts) == 2 * said


def test_a_repair_of_videos_on_one_expert(real, run, host, train):
    """Latents of two frames; the expert is told by the name of the model's file."""
    family = real.FAMILIES.get("wan") or pytest.skip("this release of diffusers does not know it")
    cheap = run.rounded(family)
    cheap.cached_patcher_init = (None, ("models/wan2.2_t2v_High_Noise_14B.safetensors",))
    vae = SimpleNamespace(decode=lambda latents: latents[:, :3].movedim(1, -1).sigmoid())
    asked = run.repair(family, model=cheap, length=5, vae=vae)
    outcome = train.train(asked)
    patch = outcome.record.loaded.patch
    assert (patch.variant.expert, patch.variant.timesteps) == ("high", (875, 1000))
    assert patch.metadata["ss_dmp_frames"] == "5"
    assert outcome.pictures.shape == (3, 8, 16, 3)  # one frame of each video
    how = {"steps": 1, "cfg": 1.0}  # the first step, which is this expert's
    before, target = (run.sample(model, family, **how) for model in (cheap, asked.teacher))
    after = run.sample(host.attach(cheap, outcome.record), family, **how)
    assert before.shape[2] == asked.latent_frames == 2
    assert (after - target).norm() < 0.9 * (before - target).norm()


def test_a_repair_of_videos_from_a_picture(family, run, host, train):
    """Conditionings have the picture, as ComfyUI's own nodes put it there."""
    family = importlib.import_module("tests.comfyui_dmp.realwan").picture()
    mask = torch.ones(1, 1, 2, 16, 8)
    mask[:, :, 0] = 0.0
    given = {"concat_latent_image": torch.randn(1, 16, 2, 16, 8), "concat_mask": mask}
    told = [run.conditioning(family, sign) for sign in (1.0, -1.0)]
    for conditioning in told:
        conditioning[0][1].update(given)
    asked = run.repair(family, positive=told[:1], negative=told[1], length=5)
    outcome = train.train(asked)
    patched = host.attach(asked.model, outcome.record)
    before, after, target, other = (
        run.sample(model, family, cfg=1.0, **more)
        for model, more in (
            (asked.model, given),
            (patched, given),
            (asked.teacher, given),
            (asked.teacher, {}),
        )
    )
    assert (after - target).norm() < 0.9 * (before - target).norm()
    assert (other - target).norm() > 0.1 * target.norm()  # the picture is looked at


def test_what_only_wan_has_is_refused_elsewhere(real, run, train):
    plain, video = real.FAMILIES["sd15"], real.FAMILIES.get("wan")
    with pytest.raises(PatchError, match="expected the expert auto or none for base") as told:
        train.train(run.repair(plain, expert="low", length=5))
    assert "expected a length of 1 for base" in str(told.value)
    if video is not None:
        start = run.record(video.patch(mix="modulate", expert="low"))
        with pytest.raises(PatchError, match="found 6: the nearest is 5") as told:
            train.train(run.repair(video, expert="high", start=start, length=6))
        assert "a patch for the expert high to go on with, found one for low" in str(told.value)
