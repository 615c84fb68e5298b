"""Samplers: every one from equal noise, whatever the batch."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dmp_common import PatchError
from training.objective.sampling import SAMPLERS, denoise, make_sampler, noises

# Of diffusers' own samplers with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLEAN = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)


def knows(scheduler: diffusers.DDIMScheduler):
    """A model that knows the clean picture: the right noise, and a variance behind it."""
    alphas = scheduler.alphas_cumprod

    def predict(x: Tensor, step: Tensor, given) -> Tensor:
        a = alphas[int(step)]
        noise = (x - a.sqrt() * CLEAN) / (1 - a).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    return predict


@pytest.mark.parametrize("name", ["default", "ddim", "ddpm", "dpm++", "unipc"])
def test_every_sampler_arrives_where_the_model_leads(name: str) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    sampler = make_sampler(scheduler, 20, 64, name)
    assert len(sampler.timesteps) == 20
    noise, sources = noises([0, 1], (1, 8, 8))
    drawn = denoise(knows(scheduler), sampler, noise, {}, None, 1.0, sources)
    assert drawn.shape == (2, 1, 8, 8)
    torch.testing.assert_close(drawn, CLEAN.expand(2, 1, 8, 8), atol=0.05, rtol=0)


def test_euler_sees_scaled_noise() -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    sampler = make_sampler(scheduler, 20, 64, "euler")
    noise, _ = noises([0, 1], (1, 8, 8))
    seen: list[float] = []

    def predict(x: Tensor, step: Tensor, given) -> Tensor:
        seen.append(float(x.std()))
        return knows(scheduler)(x, step.round().long(), given)

    drawn = denoise(predict, sampler, noise, {}, None, 1.0)
    assert 0.8 < seen[0] < 1.2  # not the sampler's own scale, in which it begins at 150
    torch.testing.assert_close(drawn, CLEAN.expand(2, 1, 8, 8), atol=0.1, rtol=0)


def test_added_noise_is_of_the_sample_and_not_of_the_batch() -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample=False)

    def drawn(names: list[int]) -> Tensor:
        noise, sources = noises(names, (1, 8, 8))
        sampler = make_sampler(scheduler, 5, 64, "ddpm")
        return denoise(lambda x, t, given: 0.5 * x, sampler, noise, {}, None, 1.0, sources)

    together = drawn([0, 1, 2])
    torch.testing.assert_close(drawn([1]), together[1:2])
    assert not torch.allclose(together[0], together[1])


def test_guidance_leads_away_from_no_condition() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def predict(x: Tensor, step: Tensor, given) -> Tensor:
        return given["value"].expand_as(x)

    def drawn(scale: float) -> Tensor:
        sides = ({"value": torch.tensor(1.0)}, {"value": torch.tensor(0.5)})
        noise = torch.zeros(1, 1, 2, 2)
        return denoise(predict, make_sampler(scheduler, 2, 1), noise, *sides, scale)

    torch.testing.assert_close(drawn(3.0) - drawn(1.0), 2 * (drawn(2.0) - drawn(1.0)))
    assert not torch.equal(drawn(2.0), drawn(1.0))


def test_guidance_of_some_channels_leaves_the_others_to_the_condition() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def drawn(scale: float, guided: int | None) -> Tensor:
        sides = ({"value": torch.tensor(1.0)}, {"value": torch.tensor(0.5)})
        noise, sampler = torch.zeros(1, 4, 2, 2), make_sampler(scheduler, 2, 1)
        return denoise(
            lambda x, step, given: given["value"].expand_as(x), sampler, noise, *sides, scale,
            guided=guided,
        )  # fmt: skip

    guided, conditional, some = drawn(3.0, None), drawn(1.0, None), drawn(3.0, 3)
    assert torch.equal(some[:, :3], guided[:, :3])
    assert torch.equal(some[:, 3:], conditional[:, 3:])
    assert not torch.allclose(guided[:, 3:], conditional[:, 3:])
    assert torch.equal(drawn(3.0, 4), guided)
    with pytest.raises(PatchError, match="as the model has, 4, found 5: lower --guided_channels"):
        drawn(3.0, 5)


def test_unknown_samplers_are_errors() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert len(make_sampler(flow, 3, 64, "euler").timesteps) == 3
    with pytest.raises(PatchError, match="expected sampler euler for a flow model, found ddim"):
        make_sampler(flow, 3, 64, "ddim")
    with pytest.raises(PatchError, match="out of default, ddim"):
        make_sampler(diffusers.DDIMScheduler(), 3, 64, "magic")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_removes_the_noise_that_a_perfect_model_names(name: str) -> None:
    """Whatever a sampler adds on its way, the last step leaves the picture alone."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    sampler = make_sampler(scheduler, 10, 64, name)
    alphas = scheduler.alphas_cumprod
    picture = torch.full((1, 1, 4, 4), 0.5)

    def predict(x: torch.Tensor, step: torch.Tensor, given: object) -> torch.Tensor:
        alpha = float(np.interp(float(step), np.arange(1000), alphas.numpy()))
        return (x - alpha**0.5 * picture) / (1 - alpha) ** 0.5

    source = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 4, 4, generator=source)
    drawn = denoise(predict, sampler, noise, {}, None, 1.0, [torch.Generator().manual_seed(1)])
    again = make_sampler(scheduler, 10, 64, name)
    repeated = denoise(predict, again, noise, {}, None, 1.0, [torch.Generator().manual_seed(1)])
    assert torch.equal(drawn, repeated)
    torch.testing.assert_close(drawn, picture, atol=0.1, rtol=0)
