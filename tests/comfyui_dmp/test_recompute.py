"""The memory of training: recomputed blocks, weights off the GPU, and what ComfyUI is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from comfyui_dmp.states import States
from dmp_common import PatchError
from dmp_common.attach.record import LoadedPatch
from tests.comfyui_dmp.familynames import NAMES

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

ADDED = ["sd15", "sd3", "pixart", "z-image"]  # one for each kind of slot


@pytest.fixture
def student(host) -> Any:
    return importlib.import_module("comfyui_dmp.student")


@pytest.fixture
def steps(student, monkeypatch) -> Any:
    """One step of a training: its gradients, and the bytes that are kept for the backward pass."""

    def run(patcher: Any, family: Any, patch: Any, recompute: bool) -> tuple[dict[str, Any], int]:
        x, text, pooled = family.inputs(2)
        sampling = patcher.model.model_sampling
        sigmas = torch.stack([torch.as_tensor(sampling.percent_to_sigma(p)) for p in (0.2, 0.6)])
        sigmas = sigmas.float()
        t = family.base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
        states = States(x, sigmas, t, torch.randn_like(x), torch.zeros(2).long(), None)
        gradients: dict[str, Any] = {}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held: list[torch.Tensor] = []
        own = {p.data_ptr() for p in patcher.model.parameters()}

        def fit(patch: Any, predict: Any, *_: Any) -> None:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                predict(0, states)
            predict(0, states).square().mean().backward()
            gradients.update({n: p.grad.clone() for n, p in patch.named_parameters()})
            patch.zero_grad()

        monkeypatch.setattr(student, "fit", fit)
        cond = [[text[:1], {"pooled_output": pooled[:1]}]]
        recipe = importlib.import_module("comfyui_dmp.fitting").Recipe(1, 0.01, 0)
        training = student.Student(patcher, LoadedPatch(patch, Path("a")), recompute)
        training.train(states, states, [cond], recipe, 2, 3, lambda *_: True)
        return gradients, sum(size for place, size in kept.items() if place not in own)

    return run


def test_every_family_is_tried(real):
    assert set(real.FAMILIES) <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "mix"), [(name, "modulate") for name in NAMES] + [(name, "add") for name in ADDED]
)
def test_equal_gradients_with_less_memory(real, steps, name, mix):
    family = real.FAMILIES.get(name) or pytest.skip("not in these releases")
    patcher, patch = family.comfy(), family.patch(std=0.05, mix=mix)
    before = {n: vars(m).get("forward") for n, m in patcher.model.named_modules()}
    whole, most = steps(patcher, family, patch, False)
    again, least = steps(patcher, family, patch, True)
    assert {n: vars(m).get("forward") for n, m in patcher.model.named_modules()} == before
    assert all(not m._forward_hooks for m in patcher.model.modules())
    for key, gradient in whole.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6)
    assert sum(float(gradient.abs().sum()) for gradient in whole.values()) > 0
    # Fields that are added are as large as these small blocks.
    assert mix == "add" or least < most / 2, (least, most)


def with_lora(patcher: Any) -> Any:
    """A model with other weights; ComfyUI computes in each call those that are not loaded."""
    clone = patcher.clone()
    weights = patcher.model.diffusion_model.state_dict()
    clone.add_patches(
        {
            f"diffusion_model.{name}": ("diff", (torch.full_like(value, 0.01),))
            for name, value in weights.items()
            if value.dim() == 2
        }
    )
    return clone


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_are_not_loaded(real, steps, monkeypatch, name, recompute):
    """As with --lowvram and --reserve-vram: most layers copy and change their weights in a call."""
    import comfy.model_management as management

    family = real.FAMILIES[name]
    patch = family.patch(std=0.05, mix="modulate")
    whole, _ = steps(with_lora(family.comfy()), family, patch, recompute)
    load = management.LoadedModel.model_load

    def loaded(model: Any, memory: float, force_patch_weights: bool = False) -> Any:
        return load(model, 5000, force_patch_weights)

    monkeypatch.setattr(management.LoadedModel, "model_load", loaded)
    partly = with_lora(family.comfy())
    again, _ = steps(partly, family, patch, recompute)
    assert partly.model.model_lowvram
    assert partly.model.model_loaded_weight_memory < partly.model_size() / 2
    assert sum(float(gradient.abs().sum()) for gradient in whole.values()) > 0
    for key, gradient in whole.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "recompute", "times"), [("sd15", False, 9), ("flux", True, 2)])
def test_a_training_asks_for_its_memory(real, steps, run, monkeypatch, name, recompute, times):
    import comfy.model_management as management

    family, asked, streams = real.FAMILIES[name], [], []
    load = management.load_models_gpu

    def loaded(models: Any, **memory: Any) -> Any:
        asked.append(memory["minimum_memory_required"])
        streams.append(management.NUM_STREAMS)
        return load(models, **memory)

    monkeypatch.setattr(management, "load_models_gpu", loaded)
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    run.sample(family.comfy(), family, count=2, cfg=1.0)
    steps(family.comfy(), family, family.patch(mix="modulate"), recompute)
    assert asked[-1] == pytest.approx(times * asked[0])
    assert (streams[0], streams[-1], management.NUM_STREAMS) == (2, 0, 2)


def test_a_dynamic_model_is_loaded_without_dynamic_vram(real, student, host, run, monkeypatch):
    """ComfyUI's own patcher, as on a GPU, where nothing is copied to it."""
    import comfy.model_patcher as patchers

    if not hasattr(patchers, "ModelPatcherDynamic"):
        pytest.skip("needs a ComfyUI with dynamic VRAM")
    # The library that keeps its buffers needs a driver.
    buffers = importlib.import_module("comfy_aimdo.host_buffer")
    monkeypatch.setattr(buffers, "HostBuffer", lambda *_: None)
    monkeypatch.setattr(patchers.ModelPatcherDynamic, "__del__", lambda self: None)
    family = real.FAMILIES["sd15"]
    cpu, plain = torch.device("cpu"), family.comfy()
    gpu = torch.device("cuda", 0)
    dynamic = patchers.ModelPatcherDynamic(family.comfy().model, gpu, cpu)
    loaded = LoadedPatch(family.patch(mix="modulate"), Path("a"))
    with pytest.raises(PatchError, match="without dynamic VRAM for training"):
        student.Student(dynamic, loaded, True)
    dynamic.cached_patcher_init = (lambda *_, disable_dynamic: plain, ())
    patched = host.attach(dynamic, run.record(loaded.patch))
    assert patched.is_dynamic()
    trained = student.Student(patched, loaded, True).model_patcher
    assert not trained.is_dynamic()
    assert trained.model is plain.model
