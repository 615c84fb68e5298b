"""The training loop on a tiny base: what it changes, what it must not, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dmp_common import Patch, PatchError, attach
from training.config import TrainConfig
from training.frozen import FrozenBase
from training.loop import History
from training.objective import Student, parameter_groups

Run = Callable[..., tuple[Patch, History]]


def falling() -> Callable[[], float]:
    """A validation that improves every time, so that the last patch is kept."""
    values: Iterator[int] = iter(range(1000, 0, -1))
    return lambda: float(next(values))


def test_patch_learns_and_base_does_not(run: Run, frozen: FrozenBase) -> None:
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    patch, history = run(falling(), importance_weight=0.1, load_weight=0.1)
    for name, value in frozen.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(not p.requires_grad and p.grad is None for p in frozen.model.parameters())
    assert not frozen.model._forward_pre_hooks
    assert all(bool(tensor.any()) for tensor in patch.tensors().values())  # gate and every site
    assert history.best_step == 4
    assert set(history.losses) == {"loss", "denoising", "importance", "load"}
    assert not patch.training


def test_training_lowers_the_loss(run: Run, frozen: FrozenBase) -> None:
    patch, _ = run(falling(), max_train_steps=60, learning_rate=1e-2, ema_decay=0.0)
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(64) % 10
    config = TrainConfig(base="tiny-digits", caption_dropout_rate=0.0)

    def loss() -> float:
        blank = Patch.create(patch.base)  # the student attaches a patch of its own
        student = Student(frozen, blank, config).eval()
        try:
            return float(student(images, labels, torch.Generator().manual_seed(1))["loss"])
        finally:
            student.attachment.remove()

    with torch.no_grad():
        base = loss()
        with attach(frozen.model, patch):
            assert loss() < 0.98 * base


def test_runs_repeat_exactly(run: Run) -> None:
    first, second, other = (run(falling(), seed=seed)[0].tensors() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_best_validation_is_kept(run: Run) -> None:
    values = iter([5.0, 3.0, 4.0, 6.0])
    kept, history = run(lambda: next(values), max_train_steps=3, validate_every_n_steps=1)
    assert history.best_step == 1
    assert history.validation == {0: 5.0, 1: 3.0, 2: 4.0, 3: 6.0}
    single, _ = run(falling(), max_train_steps=1)
    for name, tensor in single.tensors().items():
        assert torch.equal(kept.tensors()[name], tensor)


def test_a_run_that_never_beats_the_base_leaves_its_best(run: Run) -> None:
    rising = iter(range(100))
    patch, history = run(lambda: float(next(rising)), max_train_steps=3, validate_every_n_steps=1)
    assert history.best_step == 1
    assert bool(patch.tensors()["prompts.block.0"].any())


def test_validation_sees_the_average(run: Run, frozen: FrozenBase) -> None:
    """The validated patch is the averaged one, and training goes on from the plain one."""
    plain, _ = run(falling(), ema_decay=0.0)
    averaged, _ = run(falling(), ema_decay=0.5)
    name = "prompts.block.0"
    assert 0 < averaged.tensors()[name].norm() < plain.tensors()[name].norm()


def test_steps_count_updates_not_batches(run: Run) -> None:
    _, history = run(falling(), gradient_accumulation_steps=3, max_train_steps=2)
    assert list(history.validation) == [0, 2]


def test_gradient_checkpointing_changes_nothing(run: Run, frozen: FrozenBase) -> None:
    plain, _ = run(falling())
    frozen.model.enable_gradient_checkpointing()
    checkpointed, _ = run(falling())
    frozen.model.disable_gradient_checkpointing()
    for name, tensor in plain.tensors().items():
        assert torch.allclose(tensor, checkpointed.tensors()[name], atol=1e-6)


def test_non_finite_loss_stops_and_keeps_the_last_good_values(run: Run) -> None:
    with pytest.raises(PatchError, match=r"finite losses, found .* lower --learning_rate"):
        run(falling(), learning_rate=1e30, max_grad_norm=0.0, max_train_steps=20)


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
    ],
    ids=str,
)
def test_every_variant_trains(run: Run, variant: dict[str, object]) -> None:
    # A gate behind zero prompts gets its first gradient in the second step.
    patch, _ = run(falling(), importance_weight=0.01, load_weight=0.01, **variant)
    if variant == {"dmp_depth": 1}:
        assert list(patch.sites) == ["block.0"]
    # Every tensor moved: those that begin at zero are not zero any more.
    assert all(bool(tensor.any()) for tensor in patch.tensors().values())


def test_gate_has_its_own_rate(frozen: FrozenBase) -> None:
    config = TrainConfig(base="tiny-digits", learning_rate=0.5, gate_lr_factor=10, load_weight=1)
    student = Student(frozen, Patch.create(frozen.base), config)
    prompts, gate = parameter_groups(student, config)
    assert (prompts["lr"], gate["lr"]) == (0.5, 5.0)
    assert {id(p) for p in gate["params"]} == {
        id(p) for p in (*student.patch.gate.parameters(), *student.noise.parameters())
    }
    student.attachment.remove()


def test_labels_are_dropped_at_the_rate_asked_for(
    frozen: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(base="tiny-digits", caption_dropout_rate=0.25)
    student = Student(frozen, Patch.create(frozen.base), config).train()
    assert student.patch.training
    assert not student.backbone.training  # DiT would drop labels once more, per block
    seen: list[torch.Tensor] = []
    handle = frozen.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    student(torch.zeros(4000, 1, 8, 8), torch.zeros(4000, dtype=torch.long), torch.Generator())
    handle.remove()
    student.attachment.remove()
    assert float((seen[0] == 10).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert set(seen[0].tolist()) == {0, 10}
