"""Every optimiser by its kohya name trains a patch, and its state is restored."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from dmp_common import Patch, PatchError
from tests.training.conftest import Go, Start, patch_of
from training.options.command_line import resolve
from training.run.optimisers import OPTIMISERS, make_optimiser, make_schedule
from training.run.state import state_folder

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
    steps = 8 if name == "RAdamScheduleFree" else 4  # its first five steps move nothing
    options = {"optimizer_type": name.lower(), "learning_rate": rate, "max_train_steps": steps}
    whole, events = go(**options, save_state=True, save_every_n_steps=2)
    saved = Patch.load(events.outputs.path())
    assert any(bool(tensor.any()) for tensor in saved.tensors().values())
    early = state_folder(events.outputs.folder, "tiny-digits-dmp", 2)
    rest, events = go(**options, resume=str(early))
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
    with pytest.raises(PatchError, match="expected a class Quantum in torch.optim"):
        start(optimizer_type="torch.optim.Quantum")


@pytest.mark.parametrize(
    "name", [n for n, (_, package) in OPTIMISERS.items() if package != "torch"]
)
def test_missing_package_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, package = OPTIMISERS[name]
    monkeypatch.setitem(sys.modules, path.rpartition(".")[0], None)
    with pytest.raises(PatchError, match=f"pip install {package}"):
        rates(1, optimizer_type=name)


def rates(steps: int, **options: object) -> list[float]:
    """The learning rate after each of some steps, as a share of the one asked for."""
    config = resolve({"base": "sd15", "learning_rate": 1e-3, "recipe": "none", **options})
    optimiser = make_optimiser(config, [{"params": [torch.nn.Parameter(torch.zeros(1))]}])
    schedule = make_schedule(config, optimiser, steps)
    found = []
    for _ in range(steps):
        optimiser.step()
        schedule.step()
        found.append(optimiser.param_groups[0]["lr"] / 1e-3)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),  # takes no warm-up
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, 0.854, 0.5, 0.146, 0]),
        ("polynomial", [0.5, 1, 0.5625, 0.25, 0.0625, 0]),
        ("inverse_sqrt", [0.5, 1, 0.816, 0.707, 0.632, 0.577]),
    ],
)
def test_schedules(name: str, expected: list[float]) -> None:
    """Over all steps, with two of warm-up."""
    found = rates(6, lr_scheduler=name, lr_warmup_steps=2, lr_scheduler_power=2.0)
    assert found == pytest.approx(expected, abs=1e-3)


def test_warm_up_below_one_is_a_share_of_the_steps() -> None:
    for name in ("constant_with_warmup", "linear", "cosine"):
        shared = rates(6, lr_scheduler=name, lr_warmup_steps=1 / 3)
        assert shared == rates(6, lr_scheduler=name, lr_warmup_steps=2)


@pytest.mark.parametrize("name", ["cosine", "cosine_with_min_lr", "warmup_stable_decay"])
def test_schedules_with_a_minimum_end_there(name: str) -> None:
    options = {"lr_scheduler": name, "lr_decay_steps": 0.5}
    found = rates(8, **options, lr_scheduler_min_lr_ratio=0.1)
    assert found[-1] == pytest.approx(0.1)
    assert min(found) == found[-1]
    if name == "warmup_stable_decay":
        assert found[:4] == [1, 1, 1, 1]
    assert rates(8, **options)[-1] == pytest.approx(0, abs=1e-9)


def test_any_schedule_by_its_class() -> None:
    halving = {"lr_scheduler_args": ["step_size=2", "gamma=0.5"]}
    for path in ("StepLR", "torch.optim.lr_scheduler.StepLR"):
        found = rates(4, lr_scheduler_type=path, **halving)
        assert found == pytest.approx([1, 0.5, 0.5, 0.25])
    with pytest.raises(PatchError, match="expected arguments that torch.*StepLR takes"):
        rates(4, lr_scheduler_type="StepLR", lr_scheduler_args=["quantum=1"])
    with pytest.raises(PatchError, match="expected a class Magic in torch.optim.lr_scheduler"):
        rates(4, lr_scheduler_type="Magic")
