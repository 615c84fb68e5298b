"""The paper's class-conditional DiT through ComfyUI_ExtraModels' own loader and model."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dmp_common import Base, Patch, attach, bases, register_base
from tests.randomness import randomise

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def loader(comfyui_path) -> ModuleType:
    path = Path(os.environ.get("COMFYUI_EXTRAMODELS_PATH", ""))
    if not (path / "DiT" / "loader.py").is_file():
        pytest.skip("needs ComfyUI_ExtraModels: set COMFYUI_EXTRAMODELS_PATH to its folder")
    pytest.importorskip("timm", reason="needs timm, as ComfyUI_ExtraModels does")
    for name in ("", ".model", ".loader"):
        file = path / "DiT" / f"{name[1:] or '__init__'}.py"
        spec = importlib.util.spec_from_file_location(
            f"extramodels_dit{name}",
            file if file.is_file() else None,
            loader=None if file.is_file() else _Empty(),
            submodule_search_locations=None if name else [str(path / "DiT")],
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["extramodels_dit.loader"]


class _Empty:
    """A package without an `__init__.py`."""

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        return None


@pytest.fixture(scope="module")
def base() -> Base:
    return register_base(bases.dit("comfy-dit-extra", depth=3, width=32, patch_size=2))


@pytest.fixture
def patcher(loader, real, tmp_path) -> Any:
    config = {"depth": 3, "num_heads": 2, "patch_size": 2, "hidden_size": 32, "input_size": 8}
    model = sys.modules["extramodels_dit.model"].DiT(**config, num_classes=10)
    pos_embed = model.pos_embed.clone()
    real.randomised(model)
    model.pos_embed.copy_(pos_embed)
    torch.save({"model": model.state_dict()}, tmp_path / "dit.pt")
    settings = {"beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 0.02}
    return loader.load_dit(
        str(tmp_path / "dit.pt"), {"unet_config": config, "sampling_settings": settings}
    )


def test_dit_of_extramodels(patcher, base, host, run, real):
    """Equal to our own hooks on the same module, for both conditions of the gate."""
    x, labels = real.noise(1, 2, 4, 8, 8), torch.tensor([[3], [7]])
    sigmas = torch.tensor([2.0, 5.0])
    timesteps = patcher.model.model_sampling.timestep(sigmas)
    plain = call(patcher, x, sigmas, labels)
    for condition in ("t", "t+y"):
        patch = randomise(Patch.create(base, condition=condition, grid=(4, 4)).eval(), 0)
        patched = host.attach(patcher, run.record(patch, strength=0.5))
        ours = call(patched, x, sigmas, labels)
        model = patcher.model.diffusion_model
        scaled = patcher.model.model_sampling.calculate_input(sigmas, x)
        if condition == "t":
            with torch.inference_mode(), attach(model, patch, strength=0.5):
                out = model(scaled, timesteps.float(), labels.float())
            theirs = patcher.model.model_sampling.calculate_denoised(sigmas, out, x)
            torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, plain)
        assert torch.equal(call(patcher, x, sigmas, labels), plain)
        zero = host.attach(patcher, run.record(Patch.create(base, condition=condition)))
        assert torch.equal(call(zero, x, sigmas, labels), plain)


def call(patcher: Any, x: torch.Tensor, sigmas: torch.Tensor, labels: torch.Tensor) -> Any:
    with torch.inference_mode():
        return patcher.model.apply_model(
            x, sigmas, c_crossattn=labels, transformer_options={"wrappers": patcher.wrappers}
        )
