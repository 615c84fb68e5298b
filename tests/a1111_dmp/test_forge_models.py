"""Patches on Forge Neo's own model classes in small, beside ComfyUI's with the same weights.

WEBUI_PATH=...     Forge Neo's folder
COMFYUI_PATH=...   ComfyUI's folder, whose Python packages with those of Forge Neo must be there
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import PatchError, detect_base
from tests.a1111_dmp import forge_classes, stand_in
from tests.a1111_dmp.forge_classes import CLASSES, Loaded
from tests.comfyui_dmp.conftest import comfyui_path as comfyui_path
from tests.comfyui_dmp.conftest import host as comfyui
from tests.comfyui_dmp.conftest import real as real
from tests.comfyui_dmp.conftest import run as run

__all__ = ["comfyui"]
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

SIGMAS = {"epsilon": (3.0, 0.4), "flow": (0.8, 0.3)}


@pytest.fixture(params=[name for name in CLASSES if name != "wan-picture"])
def family(request: pytest.FixtureRequest, real: ModuleType) -> Any:
    """The families that Forge Neo has an engine for."""
    return real.FAMILIES.get(request.param) or pytest.skip("not in these releases")


@pytest.fixture
def loaded(family: Any, host: SimpleNamespace) -> Loaded:
    return load(family, host)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> SimpleNamespace:
    """Our files in a stand-in for the web UI; the model and its backend are the real ones."""
    forge_classes.find()
    return stand_in.install(monkeypatch, tmp_path / "models")


def load(family: Any, host: SimpleNamespace) -> Loaded:
    """Lets the host have loaded a model of a family."""
    loaded = Loaded(forge_classes.model_of(family))
    host.modules.shared.sd_model = loaded.shared
    return loaded


def attached(host: SimpleNamespace, record: Any) -> Any:
    """The attachment, made as for a generation."""
    import a1111_dmp.session

    return a1111_dmp.session.attached(host.host.current_model(), record)


def sigmas_of(family: Any) -> Tensor:
    return torch.tensor(SIGMAS[family.base.prediction])


def inputs(family: Any, sigmas: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latent, caption and conditions, as `run.call` gives them to ComfyUI's model."""
    x, text, pooled = family.inputs(len(sigmas))
    conds = {}
    if family.adm:
        model, (rows, columns) = family.comfy().model, x.shape[-2:]
        conds["y"] = model.encode_adm(pooled_output=pooled, height=8 * rows, width=8 * columns)
    elif family.name == "flux":
        conds["y"] = pooled
    return x * sigmas.reshape(-1, *[1] * (x.dim() - 1)), text, conds


def call(loaded: Loaded, family: Any, sigmas: Tensor) -> Tensor:
    x, text, conds = inputs(family, sigmas)
    return loaded.call(x, sigmas, text, **conds)


def hooks_on(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def close(found: Tensor, expected: Tensor, x: Tensor) -> bool:
    """Whether two denoised latents say the same of the noise."""
    return bool((found - expected).norm() < 1e-4 * (expected - x).norm())


@pytest.mark.parametrize("kind", ["add", "modulate"])
def test_patches_act_as_in_comfyui(family, loaded, host, comfyui, run, kind):
    """Items of different timesteps, at all sites; the model's own schedule says the timesteps."""
    variant = {"sites": "all", "std": 0.2} if kind == "add" else {"mix": kind, "std": 0.02}
    record = run.record(family.patch(**variant), strength=0.7)
    sigmas, patcher = sigmas_of(family), family.comfy()
    x = inputs(family, sigmas)[0]
    plain = call(loaded, family, sigmas)
    assert close(plain, run.call(patcher, family, sigmas), x)
    expected = run.call(comfyui.attach(patcher, record), family, sigmas)
    attachment = attached(host, record)
    assert close(call(loaded, family, sigmas), expected, x)
    assert not close(expected, plain, x)
    assert attachment.calls == 1
    attachment.remove()
    assert hooks_on(loaded.denoiser) == 0
    assert torch.equal(call(loaded, family, sigmas), plain)


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_a_zero_patch_and_strength_zero_are_the_plain_model(family, loaded, host, run, mix):
    sigmas = sigmas_of(family)
    plain = call(loaded, family, sigmas)
    for seed, strength in ((None, 1.0), (1, 0.0)):
        record = run.record(family.patch(seed, mix=mix), strength=strength)
        with attached(host, record):
            assert torch.equal(call(loaded, family, sigmas), plain)


def test_a_schedule_acts_at_the_progress_of_the_hosts_own_schedule(family, loaded, host, run):
    record = run.record(family.patch(std=0.2, sites="all"), start=0.3, end=0.6)
    predictor = loaded.k_model.predictor
    for percent, acts in ((0.2, False), (0.4, True), (0.7, False)):
        sigmas = torch.tensor([predictor.percent_to_sigma(percent)] * 2)
        plain = call(loaded, family, sigmas)
        with attached(host, record):
            assert torch.equal(call(loaded, family, sigmas), plain) != acts
    model, base = host.host.current_model(), family.base
    assert model.prediction == base.prediction
    if base.prediction == "flow":
        for percent in (0.0, 0.2, 0.9):
            expected = 1000 * predictor.percent_to_sigma(percent)
            assert model.to_timestep(base, percent) == pytest.approx(expected, abs=0.01)


def references_of(loaded: Loaded) -> Any:
    """Where the model looks for reference pictures."""
    return sys.modules[type(loaded.denoiser).__module__].dynamic_args


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image"])
def test_edits_patch_the_picture_and_not_the_reference(
    real, host, comfyui, run, monkeypatch, name
) -> None:
    """The host gives references to the model past its arguments."""
    family = real.FAMILIES.get(name) or pytest.skip("not in these releases")
    loaded, sigmas = load(family, host), sigmas_of(family)
    reference = real.noise(9, 2, family.channels, *family.frames, 4, 8)
    record = run.record(family.patch(sites="all", std=0.2), strength=0.7)
    monkeypatch.setattr(references_of(loaded), "ref_latents", [reference])
    patcher = comfyui.attach(family.comfy(), record)
    expected = run.call(patcher, family, sigmas, ref_latents=[reference])
    with attached(host, record):
        found = call(loaded, family, sigmas)
    assert close(found, expected, inputs(family, sigmas)[0])


def test_a_reference_is_a_frame_that_anima_keeps(real, host, run, monkeypatch):
    """Its reference, of the latent's size, follows as a frame; ComfyUI gives it none."""
    family = real.FAMILIES.get("anima") or pytest.skip("not in these releases")
    loaded, sigmas = load(family, host), sigmas_of(family)
    reference = real.noise(9, 1, family.channels, *family.frames, *family.size)
    monkeypatch.setattr(references_of(loaded), "ref_latents", [reference])
    seen: list[Tensor] = []
    plain = call(loaded, family, sigmas)
    with attached(host, run.record(family.patch(sites=["block.0"]))):
        first = loaded.denoiser.blocks[0]
        handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        patched = call(loaded, family, sigmas)
        handle.remove()
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call(loaded, family, sigmas)
    handle.remove()
    assert seen[0].shape[1] == 2
    assert torch.equal(seen[0][:, 1], seen[1][:, 1])
    assert (seen[0][:, 0] != seen[1][:, 0]).any(-1).all()
    assert not torch.allclose(patched, plain)


def test_a_model_of_picture_to_video_takes_its_patch(real, host, run, monkeypatch):
    """The host puts mask and picture beside the noise inside the model."""
    from tests.comfyui_dmp import realwan

    family = realwan.picture()
    loaded, sigmas = load(family, host), sigmas_of(family)
    assert detect_base(loaded.denoiser) is family.base
    noise, text, _ = family.inputs(2)
    wan, beside = sys.modules[type(loaded.denoiser).__module__], (20, *noise.shape[2:])
    monkeypatch.setattr(wan.args.dynamic_args, "concat_latent", real.noise(9, 1, *beside))
    plain = loaded.call(noise, sigmas, text)
    with attached(host, run.record(family.patch(sites="all", std=0.2))):
        assert not close(loaded.call(noise, sigmas, text), plain, noise)
    assert torch.equal(loaded.call(noise, sigmas, text), plain)


def test_a_model_that_predicts_something_else_is_refused(real, host, run):
    """Mugen, a model of flow in SDXL's UNet, and what else the host makes of SDXL."""
    family = real.FAMILIES["sdxl"]
    loaded = load(family, host)
    loaded.k_model.predictor = load(real.FAMILIES["flux"], host).k_model.predictor
    host.modules.shared.sd_model = loaded.shared
    with pytest.raises(PatchError, match="prediction type epsilon, found flow"):
        attached(host, run.record(family.patch()))
