"""Balancing losses against cases solved by hand, and against Monte Carlo."""

from __future__ import annotations

import pytest
import torch

from dmp_common import importance_loss, load_loss
from dmp_common.patch.balancing import GateNoise, stratified_timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_importance_of_a_specialised_balanced_gate_is_zero() -> None:
    """Each timestep has its own prompt: as specialised as can be, and all prompts used alike."""
    weights = torch.eye(4)[:, None, :].expand(4, 3, 4)
    assert float(importance_loss(weights)) == 0.0
    # Summed over depth instead, as the official code does, the same gate looks bad.
    assert float(importance_loss(weights.transpose(0, 1))) == pytest.approx(3.0)
    # From a batch of one timestep too: this is why the losses see the whole schedule.
    assert float(importance_loss(weights[:1])) == pytest.approx(3.0)


def test_importance_of_a_uniform_gate_is_zero() -> None:
    assert float(importance_loss(torch.full((16, 2, 8), 1 / 8))) == pytest.approx(0.0, abs=1e-12)


def test_a_dead_prompt_costs() -> None:
    """Totals (2, 2, 2, 0): mean 1.5, population variance 0.75, CV^2 = 1/3."""
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)[:, None]
    assert float(importance_loss(weights)) == pytest.approx(1 / 3)


def test_importance_is_the_mean_over_sites() -> None:
    balanced, dead = torch.ones(2, 1, 4), torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)[:, None]
    both = torch.cat([balanced, dead], dim=1)
    assert float(importance_loss(both)) == pytest.approx(1 / 6)


def test_importance_does_not_depend_on_scale() -> None:
    weights = torch.rand(5, 2, 8, generator=generator())
    assert float(importance_loss(7 * weights)) == pytest.approx(float(importance_loss(weights)))


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_load_is_the_chance_of_being_chosen(k: int) -> None:
    """j's own noise is drawn again many times, all other noise stays; then the CV^2 by hand."""
    steps, sites, prompts, draws = 3, 2, 8, 40_000
    logits = torch.randn(steps, sites, prompts, generator=generator(1))
    std = torch.rand(steps, 1, prompts, generator=generator(2)) + 0.5
    noisy = logits + torch.randn(logits.shape, generator=generator(3)) * std
    chance = torch.empty_like(logits)
    for j in range(prompts):
        again = noisy.expand(draws, *noisy.shape).clone()
        fresh = torch.randn(draws, steps, sites, generator=generator(10 + j))
        again[..., j] = logits[..., j] + fresh * std[..., j]
        rank = (again > again[..., j, None]).sum(-1)  # how many are above j
        chance[..., j] = (rank < k).float().mean(0)
    totals = chance.sum(0)
    expected = (totals.var(-1, unbiased=False) / totals.mean(-1) ** 2).mean()
    assert float(load_loss(logits, std, k, generator(3))) == pytest.approx(
        float(expected), rel=0.05, abs=2e-3
    )


def test_load_of_equal_logits_is_small_and_of_a_dead_prompt_is_not() -> None:
    steps = 512
    std = torch.ones(steps, 1, 8)
    level = torch.zeros(steps, 1, 8)
    dead = level.clone()
    dead[..., 0] = -30.0
    assert float(load_loss(level, std, 6, generator())) < 2e-3
    # Loads (0, c, ..., c), c the same seven times: CV^2 = 1/7.
    assert float(load_loss(dead, std, 6, generator())) == pytest.approx(1 / 7, abs=5e-3)


def test_load_has_the_gradient_the_official_code_lacks() -> None:
    logits = torch.randn(16, 2, 8, generator=generator()).requires_grad_()
    noise = GateNoise(4, 8)
    std = noise(torch.randn(16, 4, generator=generator(1)))
    load_loss(logits, std, 6, generator()).backward()
    assert logits.grad is not None
    assert noise.weight.grad is not None
    assert float(logits.grad.abs().max()) > 1e-4
    assert float(noise.weight.grad.abs().max()) > 1e-5


def test_following_the_load_gradient_revives_a_dead_prompt() -> None:
    logits = torch.zeros(8)
    logits[0] = -2.0
    logits.requires_grad_()
    std = torch.ones(64, 1, 8)
    before = float(logits.detach()[0])
    for seed in range(30):
        loss = load_loss(logits.expand(64, 1, 8), std, 6, generator(seed))
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 3.0 * gradient
    assert float(logits.detach()[0]) > before + 0.5


@pytest.mark.parametrize("k", [0, 8, 9])
def test_load_refuses_k_where_it_says_nothing(k: int) -> None:
    with pytest.raises(ValueError, match=f"1 to N-1 = 7, found {k}"):
        load_loss(torch.zeros(2, 1, 8), torch.ones(2, 1, 8), k)


def test_noise_starts_where_the_formula_says() -> None:
    noise = GateNoise(4, 6)(torch.ones(3, 4))
    assert noise.shape == (3, 1, 6)
    assert torch.allclose(noise, torch.log(torch.tensor(2.0)) + 1e-2)


def test_generator_decides_the_draws() -> None:
    logits, std = torch.randn(4, 2, 8, generator=generator()), torch.ones(4, 1, 8)
    first, again, other = (float(load_loss(logits, std, 6, generator(s))) for s in (5, 5, 6))
    assert first == again != other


def test_stratified_timesteps_cover_the_schedule() -> None:
    steps = stratified_timesteps(16, generator=generator())
    assert steps.shape == (16,)
    edges = torch.arange(17) * (999.0 / 16)
    assert bool((steps >= edges[:-1]).all())
    assert bool((steps <= edges[1:]).all())
    assert not torch.equal(steps, stratified_timesteps(16, generator=generator(1)))
