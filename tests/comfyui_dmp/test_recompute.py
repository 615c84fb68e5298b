"""Training that recomputes blocks in the backward pass: equal gradients, less memory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from comfyui_dmp.states import States
from dmp_common.attach.record import LoadedPatch

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

# The families of `real.py`, which imports ComfyUI.
NAMES = [
    "sd15", "sdxl", "sd3", "sd35", "flux", "flux2", "pixart", "qwen-image", "z-image", "lumina2",
]  # fmt: skip
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
    assert set(NAMES) == set(real.FAMILIES)


@pytest.mark.parametrize(
    ("name", "mix"), [(name, "modulate") for name in NAMES] + [(name, "add") for name in ADDED]
)
def test_equal_gradients_with_less_memory(real, steps, name, mix):
    family = real.FAMILIES[name]
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
