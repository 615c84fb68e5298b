"""Patches on reForge's own model classes in small, beside ComfyUI's with the same weights.

WEBUI_PATH=...     reForge's folder
COMFYUI_PATH=...   ComfyUI's folder, whose Python packages must be there
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.a1111_dmp import stand_in
from tests.comfyui_dmp.conftest import comfyui_path as comfyui_path
from tests.comfyui_dmp.conftest import host as comfyui
from tests.comfyui_dmp.conftest import real as real
from tests.comfyui_dmp.conftest import run as run

__all__ = ["comfyui"]
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

# Its loader knows these. It took their classes, and the calls of them, from ComfyUI.
CLASSES = {
    "sd15": ("openaimodel", "UNetModel", "EPS"),
    "sdxl": ("openaimodel", "UNetModel", "EPS"),
    "sd3": ("mmdit", "OpenAISignatureMMDITWrapper", "FLOW"),
    "sd35": ("mmdit", "OpenAISignatureMMDITWrapper", "FLOW"),
}


@pytest.fixture(scope="module")
def reforge() -> ModuleType:
    """`ldm_patched.modules.model_base`."""
    path = Path(os.environ.get("WEBUI_PATH", ""))
    if not (path / "ldm_patched" / "modules" / "patcher_extension.py").is_file():
        pytest.skip("needs reForge's source: set WEBUI_PATH to its folder")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    before = sys.argv[:]
    sys.argv[1:] = ["--always-cpu"]  # the host reads it where it is told to
    try:
        importlib.import_module("ldm_patched.modules.options").enable_args_parsing()
        return importlib.import_module("ldm_patched.modules.model_base")
    except ImportError as error:
        pytest.skip(f"needs the Python packages of reForge: {error}")
    finally:
        sys.argv[:] = before


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Our files in a stand-in for the web UI."""
    return stand_in.install(monkeypatch, tmp_path / "models")


def load(family: Any, reforge: ModuleType, host: SimpleNamespace) -> Any:
    """A patcher of ComfyUI's whose model is reForge's, which the host has loaded."""
    patcher = family.comfy()
    module, kind, predicts = CLASSES[family.name]
    place = f"ldm_patched.ldm.modules.diffusionmodules.{module}"
    build = getattr(importlib.import_module(place), kind)
    operations = importlib.import_module("ldm_patched.modules.ops").disable_weight_init
    config = dict(patcher.model.model_config.unet_config)  # which says the type of the weights
    config.pop("image_model", None)
    model = build(**config, device="cpu", operations=operations)
    model.load_state_dict(patcher.model.diffusion_model.state_dict())
    patcher.model.diffusion_model = model.eval().requires_grad_(False)
    settings = SimpleNamespace(sampling_settings={"shift": 3.0} if predicts == "FLOW" else {})
    sampling = reforge.model_sampling(settings, getattr(reforge.ModelType, predicts))
    inner = SimpleNamespace(diffusion_model=model, model_sampling=sampling)
    host.modules.shared.sd_model = SimpleNamespace(
        forge_objects=SimpleNamespace(unet=SimpleNamespace(model=inner)),
        sd_checkpoint_info=SimpleNamespace(filename="models/own.safetensors"),
    )
    return patcher


@pytest.mark.parametrize("mix", ["add", "modulate"])
@pytest.mark.parametrize("name", CLASSES)
def test_patches_act_as_in_comfyui(real, reforge, host, comfyui, run, name, mix):
    family = real.FAMILIES[name]
    sigmas = torch.tensor([3.0, 0.4] if family.base.prediction == "epsilon" else [0.8, 0.3])
    patch = family.patch(mix=mix, std=0.2 if mix == "add" else 0.02)
    record = run.record(patch, strength=0.7)
    expected = run.call(comfyui.attach(family.comfy(), record), family, sigmas)
    patcher = load(family, reforge, host)
    plain = run.call(patcher, family, sigmas)
    session = importlib.import_module("a1111_dmp.session")
    model = host.host.current_model()
    assert model.prediction == family.base.prediction
    with session.attached(model, record):
        found = run.call(patcher, family, sigmas)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    with session.attached(model, run.record(patch, strength=0.0)):
        assert torch.equal(run.call(patcher, family, sigmas), plain)
    assert torch.equal(run.call(patcher, family, sigmas), plain)
    percent = {"epsilon": 749.25, "flow": 900.0}[family.base.prediction]
    assert model.to_timestep(family.base, 0.25) == pytest.approx(percent, abs=0.5)
