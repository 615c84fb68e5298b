"""The training loop on a tiny base: what it changes, what it must not, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmp_common import Patch, PatchError
from tests.training.conftest import Go, Start, patch_of
from training.objective import objectives
from training.objective.inputs import Inputs
from training.run import loop
from training.run.outputs import Outputs


def rising_quality() -> Callable[[object], list[float]]:
    """A validation that improves every time, so that the last patch is kept."""
    values: Iterator[int] = iter(range(1000, 0, -1))
    return lambda student: [float(next(values))]


def test_patch_learns_and_base_does_not(start: Start) -> None:
    run, events = start(importance_weight=0.1, load_weight=0.1)
    before = {name: value.clone() for name, value in run.frozen.model.state_dict().items()}
    loop.train(run, events)
    run.method.remove()
    for name, value in run.frozen.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(not p.requires_grad and p.grad is None for p in run.frozen.model.parameters())
    assert not run.frozen.model._forward_pre_hooks
    assert all(bool(tensor.any()) for tensor in patch_of(run).tensors().values())
    assert set(run.history.losses) == {"loss", "denoising", "importance", "load"}


def test_training_lowers_the_validation_loss(go: Go) -> None:
    run, _ = go(
        max_train_steps=60, learning_rate=1e-2, ema_decay=0.0, validate_every_n_steps=60,
    )  # fmt: skip
    base = sum(run.history.base) / 2
    assert run.history.mean(0) == pytest.approx(base)  # a patch of zeros is the base
    assert run.history.mean(60) < 0.98 * base


def test_runs_repeat_exactly_and_seeds_differ(go: Go) -> None:
    first, second, other = (patch_of(go(seed=seed)[0]).tensors() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_best_validation_is_kept(go: Go) -> None:
    values = iter([3.0, 4.0, 6.0])  # before the first step it is the base, whose loss is known
    run, events = go(
        lambda student: [next(values)], max_train_steps=3, validate_every_n_steps=1, keep_best=True
    )
    assert run.history.best_step == 1
    assert run.history.validation == {0: [1.0], 1: [3.0], 2: [4.0], 3: [6.0]}
    kept = Patch.load(events.outputs.path())
    assert kept.metadata["ss_steps"] == "1"
    single, _ = go(max_train_steps=1)
    for name, tensor in patch_of(single).tensors().items():
        assert torch.equal(kept.tensors()[name], tensor)


def test_a_run_that_never_beats_the_base_leaves_its_best(go: Go) -> None:
    worse = iter(range(100))
    run, events = go(
        lambda student: [float(next(worse))],
        max_train_steps=3,
        validate_every_n_steps=1,
        keep_best=True,
    )
    assert run.history.best_step == 1
    assert bool(Patch.load(events.outputs.path()).tensors()["prompts.block.0"].any())


def test_files_and_validation_have_the_average(go: Go) -> None:
    """And training goes on from the plain values."""
    seen: list[torch.Tensor] = []

    def look(student: torch.nn.Module) -> list[float]:
        seen.append(student.method.patch.tensors()["prompts.block.0"].clone())
        return [1.0]

    name = "prompts.block.0"
    plain, events = go(ema_decay=0.0)
    own = patch_of(plain).tensors()[name]
    assert torch.equal(own, Patch.load(events.outputs.path()).tensors()[name])
    averaged, events = go(look, ema_decay=0.5, validate_every_n_steps=4)
    assert torch.equal(own, patch_of(averaged).tensors()[name])
    saved = Patch.load(events.outputs.path()).tensors()[name]
    assert torch.equal(seen[-1], saved)
    assert 0 < saved.norm() < own.norm()


def test_steps_count_updates_not_batches(go: Go) -> None:
    run, _ = go(gradient_accumulation_steps=3, max_train_steps=2)
    assert (run.step, run.position.batch) == (2, 6)


def test_global_batch_size_chooses_the_accumulation(start: Start) -> None:
    run, _ = start(global_batch_size=48)
    assert run.config.gradient_accumulation_steps == 3
    run.method.remove()
    with pytest.raises(PatchError, match="multiple of 16"):
        start(global_batch_size=40)


def test_epochs_instead_of_steps(start: Start) -> None:
    run, _ = start(max_train_epochs=2, train_batch_size=100)
    run.method.remove()
    assert run.total == 2 * 11  # 1097 digits


def test_gradient_checkpointing_changes_nothing(go: Go) -> None:
    plain, _ = go()
    checkpointed, _ = go(gradient_checkpointing=True)
    for name, tensor in patch_of(plain).tensors().items():
        assert torch.allclose(tensor, patch_of(checkpointed).tensors()[name], atol=1e-6)


def test_non_finite_loss_stops_before_anything_is_overwritten(go: Go, tmp_path: Path) -> None:
    _, events = go()
    before = events.outputs.path().read_bytes()
    with pytest.raises(PatchError, match=r"finite losses, found .* lower --learning_rate"):
        go(learning_rate=1e30, max_grad_norm=0.0, max_train_steps=20)
    assert events.outputs.path().read_bytes() == before


def test_non_finite_loss_names_the_sample(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, keys = objectives.encode, []

    def spoiled(*arguments: object) -> Inputs:
        inputs = encode(*arguments)
        clean = inputs.clean.clone()
        clean[2] = torch.nan
        keys.append(inputs.keys[2])
        return replace(inputs, clean=clean)

    monkeypatch.setattr(objectives, "encode", spoiled)
    with pytest.raises(PatchError, match=r"sample digits/train/\d{4} \(timestep \d+\)") as caught:
        go()
    assert f"sample {keys[0]} (" in str(caught.value)


@pytest.mark.parametrize(
    "variant",
    [
        {"gate": "none"},
        {"gate": "attention"},
        {"selection": "hard"},
        {"across_depth": "uniform"},
        {"mix": "prepend"},
        {"condition": "t+y"},
        {"dmp_depth": 1},
        {"prompt_init": "random", "gate_init": "random"},
        {"prompt_scale": "literal", "learning_rate": 0.01},
        {"min_timestep": 100, "max_timestep": 600},
    ],
    ids=str,
)
def test_every_variant_trains(go: Go, variant: dict[str, object]) -> None:
    # A gate behind zero prompts gets its first gradient in the second step.
    run, events = go(importance_weight=0.01, load_weight=0.01, **variant)
    patch = patch_of(run)
    if variant == {"dmp_depth": 1}:
        assert list(patch.sites) == ["block.0"]
    assert all(bool(tensor.any()) for tensor in patch.tensors().values())
    assert Patch.load(events.outputs.path()).variant == patch.variant
    assert patch.variant.timesteps == (
        variant.get("min_timestep", 0), variant.get("max_timestep", 1000)
    )  # fmt: skip


def test_literal_scale_moves_prompts_by_the_rate_itself(go: Go) -> None:
    rate = 1e-3
    options = {"max_train_steps": 1, "ema_decay": 0.0, "learning_rate": rate, "max_grad_norm": 0.0}
    literal = patch_of(go(prompt_scale="literal", **options)[0]).tensors()["prompts.block.0"]
    mean = patch_of(go(**options)[0]).tensors()["prompts.block.0"]
    assert literal.abs().max() == pytest.approx(rate, rel=1e-2)  # Adam's first step
    assert mean.abs().max() == pytest.approx(16 * rate, rel=1e-2)  # N = 16


def test_gate_has_its_own_rate(start: Start) -> None:
    run, _ = start(learning_rate=0.5, gate_lr_factor=10, load_weight=1.0)
    run.method.remove()
    prompts, gate = run.method.groups(run.config)
    assert (prompts["lr"], gate["lr"]) == (0.5, 5.0)
    assert {id(p) for p in gate["params"]} == {
        id(p) for p in (*patch_of(run).gate.parameters(), *run.method.noise.parameters())
    }


def test_paper_recipe(start: Start) -> None:
    run, _ = start(recipe="paper", lr_scheduler="constant")
    run.method.remove()
    prompts, gate = run.method.groups(run.config)
    assert (prompts["lr"], gate["lr"]) == (1e-4, pytest.approx(1e-3))
    assert run.config.train_batch_size * run.config.gradient_accumulation_steps == 128
    assert patch_of(run).learning_scale == 1.0
    assert run.average.ema is None
    assert (run.config.importance_weight, run.config.load_weight) == (1.0, 1.0)
    assert run.optimiser.optimizer.defaults["weight_decay"] == 0.0


def test_only_what_is_added_is_in_training_mode(start: Start) -> None:
    run, _ = start()
    run.wrapped.train()
    run.method.remove()
    assert patch_of(run).training
    assert not run.student.backbone.training  # DiT would drop labels once more, per block


def test_going_on_from_a_patch(go: Go, start: Start) -> None:
    _, events = go()
    path = str(events.outputs.path())
    run, _ = start(network_weights=path)
    run.method.remove()
    for name, tensor in Patch.load(path).tensors().items():
        assert torch.allclose(tensor, patch_of(run).tensors()[name], atol=1e-7)
    with pytest.raises(PatchError, match="of the variant"):
        start(network_weights=path, gate="none")
    # Entries that the file leaves out are told too.
    with pytest.raises(PatchError, match=r"found one with timesteps \[0, 1000\]: "):
        start(network_weights=path, max_timestep=500)


def test_saves_along_the_way_and_takes_old_ones_away(go: Go) -> None:
    _, events = go(
        max_train_steps=6, save_every_n_steps=1, save_last_n_steps=2, save_state=True
    )  # fmt: skip
    names = sorted(path.name for path in events.outputs.folder.iterdir())
    own = "tiny-digits-dmp"
    assert names == sorted(
        [
            *(f"{own}-step{n:08d}.safetensors" for n in (4, 5)),
            *(f"{own}-step{n:08d}-gate.png" for n in (4, 5)),
            *(f"{own}-step{n:08d}-state" for n in (4, 5, 6)),
            f"{own}.safetensors",
            f"{own}-gate.png",
            f"{own}.json",
        ]
    )


def test_states_and_files_of_the_last_epochs_are_kept(go: Go) -> None:
    """Three steps are an epoch here."""
    _, events = go(
        max_train_epochs=4, train_batch_size=400, save_every_n_epochs=1, save_state=True,
        save_last_n_epochs=2, save_last_n_steps_state=1,
    )  # fmt: skip
    names = {path.name for path in events.outputs.folder.iterdir() if "step" in path.name}
    own = "tiny-digits-dmp"
    files = {f"{own}-step{n:08d}{end}" for n in (6, 9) for end in (".safetensors", "-gate.png")}
    assert names == files | {f"{own}-step{n:08d}-state" for n in (9, 12)}


def test_validation_by_epochs(go: Go) -> None:
    run, _ = go(max_train_epochs=2, train_batch_size=400, validate_every_n_epochs=1)
    assert list(run.history.validation) == [0, 3, 6]


def test_full_disk_is_found_before_training(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("training.run.outputs.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(PatchError, match=r"MiB free in .* make room"):
        start()


def test_outputs_name_files_as_kohya(start: Start) -> None:
    run, _ = start()
    run.method.remove()
    outputs = Outputs(run.config, run.method, run.frozen)
    assert outputs.path(12).name == "tiny-digits-dmp-step00000012.safetensors"


def test_a_gradient_that_is_not_finite_ends_before_the_patch_is_spoiled(start: Start) -> None:
    for limit in (1.0, 0.0):
        run, events = start(max_train_steps=3, max_grad_norm=limit)
        first = next(iter(run.method.trainable().values()))
        first.register_hook(lambda gradient, run=run: gradient * (torch.nan if run.step else 1))
        with pytest.raises(PatchError, match="finite gradients, found others at step 2"):
            loop.train(run, events)
        assert all(bool(p.isfinite().all()) for p in run.method.trainable().values())
        assert not events.outputs.path().exists()
