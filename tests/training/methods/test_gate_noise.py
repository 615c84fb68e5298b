"""The noisy gate: noise in the forward pass of training, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from dmp_common import Patch
from dmp_common.patch.balancing import GateNoise
from tests.tiny import FAMILIES
from tests.training.conftest import Go, Start, patch_of
from training.methods.gate_noise import NoisyGate
from training.run import loop

NAMES = [(0, "sample", 7, row) for row in range(4)]


def gates(**variant: object) -> tuple[Patch, NoisyGate, torch.Tensor]:
    """A patch whose gate is not even, its noisy gate, and a time embedding (4, E)."""
    patch = Patch.create(FAMILIES["dit"].base, gate_init="random", **variant)
    e = torch.randn(4, patch.base.embedding, generator=torch.Generator().manual_seed(1))
    return patch, NoisyGate(patch, GateNoise(patch.base.embedding, patch.variant.outputs)), e


@pytest.mark.parametrize(
    "variant",
    [{}, {"gate": "attention"}, {"grids": 2, "gate_unit": "grid", "gate_form": "residual"}],
    ids=str,
)
def test_noise_is_on_the_logits_of_training_and_nowhere_else(variant: dict[str, object]) -> None:
    patch, noisy, e = gates(**variant)
    assert torch.equal(noisy(e), patch.gate(e))  # nothing is drawn yet
    noisy.draw(NAMES)
    first = noisy.logits(e) - patch.gate.logits(e)
    assert first.shape == (4, len(patch.sites), patch.variant.outputs)
    assert not torch.equal(noisy(e), patch.gate(e))
    with noisy.quiet():
        assert torch.equal(noisy(e), patch.gate(e))
    assert torch.equal(noisy.logits(e) - patch.gate.logits(e), first)
    noisy.eval()
    assert torch.equal(noisy(e), patch.gate(e))


def test_noise_starts_at_the_size_of_the_official_code() -> None:
    patch, noisy, e = gates()
    e = e.repeat(100, 1)
    noisy.draw([(0, "sample", 0, row) for row in range(len(e))])
    noise = (noisy.logits(e) - patch.gate.logits(e)).detach()
    assert float(noise.std()) == pytest.approx(0.70, abs=0.02)  # ln 2 + 0.01
    assert abs(float(noise.mean())) < 0.02


def test_noise_is_of_the_sample_whatever_else_is_in_the_batch() -> None:
    _, noisy, e = gates()
    noisy.draw(NAMES)
    whole = noisy.logits(e)
    noisy.draw(NAMES[2:])
    torch.testing.assert_close(noisy.logits(e[2:]), whole[2:])
    noisy.draw([(0, "sample", 8, row) for row in range(4)])
    assert not torch.allclose(noisy.logits(e), whole)


def test_size_of_the_noise_learns_without_a_load_loss(go: Go) -> None:
    run, events = go(gate_noise=True, load_weight=0.0, max_train_steps=3)
    assert run.method.noise.weight.any()
    saved = Patch.load(events.outputs.path())
    assert set(saved.tensors()) == set(Patch.create(saved.base).tensors())


def test_noise_changes_training_and_no_validation(start: Start) -> None:
    losses = {}
    for noisy in (False, True):
        run, _ = start(gate_noise=noisy, prompt_init="random", max_train_steps=1)
        batch = next(loop._batches(run))
        names = loop._names(run, len(batch), 0)
        aim = run.aims.aim(batch, names)
        losses[noisy] = []
        for training in (True, True, False):
            run.wrapped.train(training)
            loss = loop.step_losses(run, aim, 0)["denoising"]
            losses[noisy].append(float(loss.detach()))
        run.method.remove()
    plain, found = losses[False], losses[True]
    assert plain[0] == plain[1] == plain[2]
    assert found[0] == found[1] != plain[0]  # drawn again for the same step: the same
    assert found[2] == plain[2]


def test_paper_recipe_has_it_and_a_patch_without_gate_does_not(start: Start) -> None:
    run, _ = start(recipe="paper")
    run.method.remove()
    assert isinstance(patch_of(run).gate, NoisyGate)
    run, _ = start(recipe="paper", method="prompt")
    run.method.remove()
    assert run.method.noise is None
