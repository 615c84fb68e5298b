"""Noising, targets and weights against their papers and against diffusers."""

from __future__ import annotations

import itertools
import math

import diffusers
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from dmp_common import PatchError
from training.base.schedulers import flux_shift
from training.objective.noising import Discrete, Flow, process_of
from training.options.loss_options import ObjectiveOptions

T = torch.tensor([0, 1, 500, 998, 999])


def discrete(scheduler: dict[str, object] | None = None, **options: object) -> Discrete:
    made = diffusers.DDPMScheduler(beta_schedule="scaled_linear", **(scheduler or {}))
    process = process_of(made, ObjectiveOptions(**options))
    assert isinstance(process, Discrete)
    return process


def flow(shift: float = 1.0, **options: object) -> Flow:
    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    process = process_of(made, ObjectiveOptions(**options))
    assert isinstance(process, Flow)
    return process


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, count, 4, 6, 6, generator=draw).double())  # type: ignore[return-value]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_discrete_agrees_with_diffusers(prediction: str) -> None:
    settings = {"prediction_type": prediction}
    process, clean_noise = discrete(settings), batch()
    clean, noise = clean_noise
    reference = diffusers.DDPMScheduler(beta_schedule="scaled_linear", **settings)
    noisy = process.noisy(clean, noise, T)
    assert torch.allclose(noisy, reference.add_noise(clean, noise, T), atol=1e-6)
    target = process.target(clean, noise, T)
    expected = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": reference.get_velocity(clean, noise, T),
    }[prediction]
    assert torch.allclose(target, expected, atol=1e-6)
    # A perfect prediction means the clean data.
    assert torch.allclose(process.clean_from(target, noisy, T), clean, atol=1e-5)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_flow_density_is_the_formula_of_diffusers(scheme: str) -> None:
    """From equal draws, which diffusers makes itself."""
    theirs = compute_density_for_timestep_sampling(
        scheme, 50, 0.3, 0.8, 1.29, generator=torch.Generator().manual_seed(5)
    )
    source = torch.Generator().manual_seed(5)
    draws = torch.randn if scheme == "logit_normal" else torch.rand
    drawn = draws(50, generator=source)
    process = flow(weighting_scheme=scheme, logit_mean=0.3, logit_std=0.8)
    ours = process.times(drawn, drawn, (8, 8))
    assert torch.allclose(ours, (1000 * (1 - theirs)).clamp(1, 1000), atol=1e-3)


def snr(process: Discrete) -> Tensor:
    return process.alphas / (1 - process.alphas)


def test_weights_are_those_of_the_papers() -> None:
    plain = discrete()
    ratio = snr(plain)[T]
    assert torch.equal(plain.weights(T), torch.ones(5))
    assert torch.allclose(
        discrete(min_snr_gamma=5.0).weights(T), (ratio.clamp(max=5) / ratio).float()
    )
    velocity = {"prediction_type": "v_prediction"}
    assert torch.allclose(
        discrete(velocity, min_snr_gamma=5.0).weights(T),
        (ratio.clamp(max=5) / (ratio + 1)).float(),
    )
    assert torch.allclose(
        discrete(debiased_estimation_loss=True).weights(T),
        ratio.clamp(max=1000).rsqrt().float(),
    )
    assert torch.allclose(discrete(p2_gamma=0.5, p2_k=2.0).weights(T), (2 + ratio).rsqrt().float())


@pytest.mark.parametrize("options", [{"min_snr_gamma": 5.0}, {"p2_gamma": 1.0}], ids=str)
def test_weights_mean_the_same_error_whatever_is_predicted(options: dict[str, float]) -> None:
    """epsilon, v and x0 are linear in one another: the weighted loss must not change."""
    clean, noise = batch()
    t = torch.tensor([1, 200, 500, 700, 900])
    guess = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4)).double()
    losses = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        process = discrete({"prediction_type": prediction}, **options)
        noisy = process.noisy(clean, noise, t)
        signal, rest = process._scales(noisy, t)
        wrong_clean = clean + guess
        wrong_noise = (noisy - signal * wrong_clean) / rest
        wrong = {
            "epsilon": wrong_noise,
            "v_prediction": signal * wrong_noise - rest * wrong_clean,
            "sample": wrong_clean,
        }[prediction]
        error = (wrong - process.target(clean, noise, t)).square().flatten(1).mean(1)
        losses.append(process.weights(t) * error)
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)
    assert torch.allclose(losses[0], losses[2], rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "options", [{"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"p2_gamma": 1.0}]
)
def test_zero_terminal_snr_leaves_every_weight_finite(
    prediction: str, options: dict[str, object]
) -> None:
    process = discrete({"prediction_type": prediction, "rescale_betas_zero_snr": True}, **options)
    weights = process.weights(torch.arange(1000))
    assert process.alphas[-1] < 1e-6
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def test_timesteps_are_uniform_over_their_range() -> None:
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    t = discrete(min_timestep=100, max_timestep=300).times(u, u, (8, 8))
    assert (int(t.min()), int(t.max())) == (100, 299)
    assert float(t.float().mean()) == pytest.approx(199.5, abs=2)
    edge = torch.tensor([1 - 2**-24])
    assert int(discrete().times(edge, edge, (8, 8))) == 999


def test_bins_cover_the_schedule_without_overlap() -> None:
    u = torch.tensor([0.0, 1 - 2**-24])
    for process in (discrete(), flow()):
        edges = [process.bin(n, 7, u).tolist() for n in range(7)]
        assert edges[0][0] <= 1
        assert edges[-1][1] >= 999
        assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(edges))


def test_flow_is_a_straight_line() -> None:
    process, (clean, noise) = flow(), batch()
    t = torch.tensor([1.0, 250.0, 500.0, 900.0, 1000.0])
    noisy = process.noisy(clean, noise, t)
    target = process.target(clean, noise, t)
    sigma = (t / 1000).reshape(-1, 1, 1, 1).double()
    assert torch.allclose(noisy - sigma * target, clean, atol=1e-6)
    assert torch.allclose(noisy[-1], noise[-1])


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_flow_densities_and_weights_are_those_of_diffusers(scheme: str) -> None:
    count = 40000
    draw = torch.Generator().manual_seed(1)
    u, z = torch.rand(count, generator=draw), torch.randn(count, generator=draw)
    process = flow(3.0, weighting_scheme=scheme, logit_mean=0.3, logit_std=0.8)
    ours = process.times(u, z, (8, 8)) / 1000
    torch.manual_seed(2)
    theirs_u = compute_density_for_timestep_sampling(scheme, count, 0.3, 0.8, 1.29)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = scheduler.sigmas[(theirs_u * 1000).long().clamp(max=999)]
    for share in (0.1, 0.5, 0.9):
        assert float(ours.quantile(share)) == pytest.approx(float(theirs.quantile(share)), abs=0.02)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    expected = compute_loss_weighting_for_sd3(scheme, sigma)
    assert torch.allclose(process.weights(1000 * sigma), expected, rtol=1e-5)


def test_flow_sampling_and_shift() -> None:
    u, z = torch.rand(1000), torch.zeros(1000)
    assert torch.allclose(
        flow(timestep_sampling="uniform").times(u, z, (8, 8)), (1000 * u).clamp(min=1)
    )
    half = flow(timestep_sampling="sigmoid").times(u, z, (8, 8))
    assert torch.allclose(half, torch.full_like(half, 500.0))
    shifted = flow(timestep_sampling="shift", discrete_flow_shift=3.0).times(u, z, (8, 8))
    assert torch.allclose(shifted, torch.full_like(half, 750.0))
    # Flux's own schedule: mu 0.5 at 256 tokens, 1.15 at 4096.
    assert (flux_shift(256), flux_shift(4096)) == (0.5, pytest.approx(1.15))
    flux = flow(timestep_sampling="flux_shift").times(u, z, (128, 128))
    expected = 1000 * math.exp(1.15) / (math.exp(1.15) + 1)
    assert torch.allclose(flux, torch.full_like(half, expected))
    ranged = flow(min_timestep=200, max_timestep=400, timestep_sampling="uniform")
    assert 200 <= ranged.times(u, z, (8, 8)).min() < ranged.times(u, z, (8, 8)).max() <= 400


@pytest.mark.parametrize("option", ["min_snr_gamma", "p2_gamma", "noise_offset"])
def test_flow_refuses_what_it_does_not_have(option: str) -> None:
    with pytest.raises(PatchError, match=f"--{option}, found a flow model"):
        flow(**{option: 0.5})
    with pytest.raises(PatchError, match=f"--{option}, --multires_noise_iterations, found"):
        flow(**{option: 0.5, "multires_noise_iterations": 6})


def test_relative_loss_is_of_the_squared_error() -> None:
    with pytest.raises(PatchError, match="--loss_type l2 with --relative_loss.*found huber"):
        discrete(relative_loss=True, loss_type="huber")


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(PatchError, match="found 'quantum'"):
        discrete({"prediction_type": "quantum"})
