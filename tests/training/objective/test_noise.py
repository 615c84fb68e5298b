"""Draws of the training: functions of a sample's name, and the noise that options make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.data.draws import generator
from training.objective.noise import Draws, draw, held_out_draws, shaped
from training.options.loss_options import LossOptions

SHAPE = (4, 16, 24)
NAMES = [(7, "sample", 3, row) for row in range(5)]


def noise(names: list[tuple[object, ...]] = NAMES, **options: object) -> Tensor:
    """The noise of samples whose clean data are their own number."""
    return made(names, **options).noise


def made(names: list[tuple[object, ...]] = NAMES, **options: object) -> Draws:
    chosen = LossOptions(**options)
    clean = (
        torch.ones(len(names), *SHAPE)
        * torch.tensor([float(n[3]) for n in names])[:, None, None, None]
    )
    return shaped(draw(names, SHAPE, chosen), clean, chosen)


def test_draws_of_a_name_are_pinned() -> None:
    """Resumed runs rest on this order: u, z, noise, offset, latent."""
    found = draw(NAMES, SHAPE, LossOptions(noise_offset=0.1))
    for row, name in enumerate(NAMES):
        source = generator(*name)
        assert found.u[row] == torch.rand((), generator=source)
        assert found.z[row] == torch.randn((), generator=source)
        plain = torch.randn(SHAPE, generator=source)
        offset = torch.randn(SHAPE[0], 1, 1, generator=source)
        assert torch.equal(noise(noise_offset=0.1)[row], plain + 0.1 * offset)
        assert torch.equal(found.latent[row], torch.randn(SHAPE, generator=source))
    # One number that no code of ours makes.
    assert float(draw([("a",)], (1, 4, 4)).noise.sum()) == pytest.approx(5.288974, abs=1e-4)


def test_held_out_draws_are_those_of_training() -> None:
    plain = draw(NAMES, SHAPE)
    found, u = held_out_draws(NAMES, SHAPE)
    assert torch.equal(found, plain.noise)
    assert torch.equal(u, plain.u)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_offset": 0.2},
        {"noise_offset": 0.2, "noise_offset_random_strength": True},
        {"noise_offset": 0.2, "adaptive_noise_scale": 0.5},
        {"multires_noise_iterations": 6, "multires_noise_discount": 0.5},
        {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_noise_is_of_the_sample_and_not_of_the_batch(options: dict[str, object]) -> None:
    whole = made(**options)
    for rows in ([0, 1], [4]):
        part = made([NAMES[row] for row in rows], **options)
        assert torch.equal(part.noise, whole.rows(rows).noise)
        if whole.entering is not None:
            assert torch.equal(part.entering, whole.entering[rows])
    assert not torch.equal(whole.noise, noise()) or whole.entering is not None
    # What an option does not concern stays as it was.
    assert torch.equal(whole.u, draw(NAMES, SHAPE).u)


def offsets(**options: object) -> Tensor:
    """What is constant over each channel of the added noise (B, C)."""
    plain = draw(NAMES, SHAPE, LossOptions(noise_offset=1)).noise
    added = noise(**options) - plain
    assert float((added - added.mean((2, 3), keepdim=True)).abs().max()) < 1e-5
    return added.mean((2, 3))


def test_offset_follows_strength_and_the_means_of_the_data() -> None:
    full = offsets(noise_offset=1.0)
    torch.testing.assert_close(offsets(noise_offset=0.1), 0.1 * full, atol=1e-6, rtol=0)
    shares = offsets(noise_offset=1.0, noise_offset_random_strength=True) / full
    assert bool(((shares > 0) & (shares < 1)).all()) and len(shares[:, 0].unique()) == 5
    torch.testing.assert_close(shares[:, 0], shares[:, 1], atol=1e-4, rtol=1e-4)
    # The data of sample n have the mean n: the strength is 0.1 + 0.5 n, or never below 0.
    adapted = offsets(noise_offset=0.1, adaptive_noise_scale=0.5) / full
    torch.testing.assert_close(adapted[:, 0], 0.1 + 0.5 * torch.arange(5.0), atol=1e-4, rtol=1e-4)
    adapted = offsets(noise_offset=0.1, adaptive_noise_scale=-0.05) / full
    expected = torch.tensor([0.1, 0.05, 0, 0, 0])
    torch.testing.assert_close(adapted[:, 0], expected, atol=1e-4, rtol=1e-4)


def coarseness(values: Tensor) -> float:
    """Share of the variance that is left after averaging over 4 x 4 places; 1/16 for white."""
    return float(torch.nn.functional.avg_pool2d(values, 4).var() / values.var())


def test_noise_of_many_resolutions_is_coarse_and_of_unit_deviation() -> None:
    plain = coarseness(noise())
    some = noise(multires_noise_iterations=6, multires_noise_discount=0.3)
    much = noise(multires_noise_iterations=6, multires_noise_discount=0.9)
    torch.testing.assert_close(much.flatten(1).std(1), torch.ones(5))
    assert plain < coarseness(some) < coarseness(much)
    assert plain == pytest.approx(1 / 16, rel=0.3)
    # One iteration is noise of full resolution added to noise of full resolution.
    once = noise(multires_noise_iterations=1)
    assert coarseness(once) == pytest.approx(1 / 16, rel=0.3)


def test_perturbed_input_is_further_noise_which_the_target_does_not_have() -> None:
    found = made(ip_noise_gamma=0.1)
    assert torch.equal(found.noise, noise())
    further = found.entering - found.noise
    assert float(further.std()) == pytest.approx(0.1, rel=0.05)
    varied = made(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    spreads = (varied.entering - varied.noise).flatten(1).std(1)
    assert bool((spreads < 0.11).all()) and float(spreads.std()) > 0.005
    assert made().entering is None
