"""Every optimiser by its kohya name trains a patch, and its state is restored."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from dmp_common import Patch, PatchError
from tests.training.conftest import Go, Start, patch_of
from training.run.optimisers import OPTIMISERS, make_optimiser, make_schedule

INSTALLED = {
    name: importlib.util.find_spec(path.split(".")[0]) is not None
    for name, (path, _) in OPTIMISERS.items()
}
# bitsandbytes' 8-bit kernels need a GPU.
ON_CPU = [name for name in OPTIMISERS if "8bit" not in name]


@pytest.mark.parametrize("name", ON_CPU)
def test_trains_and_resumes(name: str, go: Go, request: pytest.FixtureRequest) -> None:
    if not INSTALLED[name]:
        pytest.skip(f"{OPTIMISERS[name][1]} is not installed")
    rate = 1.0 if name in ("Prodigy", "DAdaptAdam") else 1e-3
    options = {"optimizer_type": name.lower(), "learning_rate": rate, "max_train_steps": 4}
    whole, events = go(**options)
    saved = Patch.load(events.outputs.path())
    assert any(bool(tensor.any()) for tensor in saved.tensors().values())
    go(**{**options, "max_train_steps": 2}, save_state=True)
    rest, events = go(**options, resume="latest")
    for key, tensor in patch_of(whole).tensors().items():
        assert torch.equal(tensor, patch_of(rest).tensors()[key]), key
    for key, tensor in saved.tensors().items():
        assert torch.equal(tensor, Patch.load(events.outputs.path()).tensors()[key]), key


def test_arguments_reach_the_optimiser(start: Start) -> None:
    run, _ = start(
        optimizer_args=["betas=(0.8, 0.9)", "eps=1e-6", "amsgrad=True"], weight_decay=0.02
    )
    run.method.remove()
    defaults = run.optimiser.optimizer.defaults
    assert (defaults["betas"], defaults["eps"], defaults["amsgrad"]) == ((0.8, 0.9), 1e-6, True)
    assert defaults["weight_decay"] == 0.02


def test_any_class_by_its_path(start: Start) -> None:
    run, _ = start(optimizer_type="torch.optim.RMSprop")
    run.method.remove()
    assert type(run.optimiser.optimizer) is torch.optim.RMSprop
    with pytest.raises(PatchError, match="expected an optimiser Quantum in torch.optim"):
        start(optimizer_type="torch.optim.Quantum")


@pytest.mark.parametrize(
    "name", [n for n, (_, package) in OPTIMISERS.items() if package != "torch"]
)
def test_missing_package_says_what_to_install(
    name: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, package = OPTIMISERS[name]
    monkeypatch.setitem(sys.modules, path.rpartition(".")[0], None)
    with pytest.raises(PatchError, match=f"pip install {package}"):
        start(optimizer_type=name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, 0.854, 0.5, 0.146, 0]),
        ("polynomial", [0.5, 1, 0.5625, 0.25, 0.0625, 0]),
    ],
)
def test_schedules(name: str, expected: list[float], start: Start) -> None:
    """Over all steps, with two of warm-up; --lr_scheduler constant takes none."""
    run, _ = start(lr_scheduler=name, lr_warmup_steps=2, max_train_steps=6, lr_scheduler_power=2.0)
    run.method.remove()
    optimiser = make_optimiser(run.config, run.method.groups(run.config))
    schedule = make_schedule(run.config, optimiser, 6)
    rates = []
    for _ in range(6):
        optimiser.step()
        schedule.step()
        rates.append(optimiser.param_groups[0]["lr"] / 1e-3)
    if name == "constant":
        expected = [1.0] * 6
    if name == "polynomial":
        assert rates[:2] == pytest.approx([0.5, 1])
        assert rates[3] == pytest.approx(0.25, abs=1e-3)
        return
    assert rates == pytest.approx(expected, abs=1e-3)
