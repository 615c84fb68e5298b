"""Epsilon scaling: the same for every kind of prediction, and gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dmp_common import PatchError
from training.base.frozen import FrozenBase, load_frozen
from training.objective.labelled import labelled_samples, pixel_base
from training.objective.scaling import epsilon_scaled
from training.options.config import TrainConfig

LABELS = torch.tensor([0, 3, 9])


class Knowing(nn.Module):
    """Predicts the same noise and variance in any of the three ways."""

    def __init__(self, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.scheduler, self.dtype = scheduler, torch.float32
        self.config = SimpleNamespace(in_channels=1, sample_size=8)
        self.noise = nn.Parameter(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), False)

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> Transformer2DModelOutput:
        # Between timesteps as the samplers of diffusers do it.
        alphas = self.scheduler.alphas_cumprod.double()
        below, above = alphas[timestep.floor().long()], alphas[timestep.ceil().long()]
        sigma = torch.lerp(
            (1 / below - 1).sqrt(), (1 / above - 1).sqrt(), timestep.double() % 1
        ).reshape(-1, 1, 1, 1)
        signal = (1 + sigma**2).rsqrt().float()
        rest = signal * sigma.float()
        noise = self.noise.expand_as(x)
        clean = (x - rest * noise) / signal
        found = {
            "epsilon": noise, "v_prediction": signal * noise - rest * clean, "sample": clean,
        }[self.scheduler.config.prediction_type]  # fmt: skip
        return Transformer2DModelOutput(sample=torch.cat([found, x], dim=1))


def knowing(prediction: str) -> FrozenBase:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    return pixel_base("digits", Knowing(scheduler).eval(), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_kind_of_prediction_means_the_smaller_noise(prediction: str) -> None:
    frozen, x, t = knowing(prediction), torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999])
    with epsilon_scaled(frozen, 1.25) as scaled:
        assert scaled is frozen
        output = frozen.model(x, timestep=t, class_labels=LABELS).sample
    found, rest = output.chunk(2, dim=1)
    assert torch.equal(rest, x)  # a learned variance is not scaled
    scheduler = frozen.scheduler
    alphas = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    signal, scale = alphas.sqrt(), (1 - alphas).sqrt()
    noise = {
        "epsilon": found,
        "v_prediction": signal * found + scale * x,
        "sample": (x - signal * found) / scale,
    }[prediction]
    wanted = (frozen.model.noise / 1.25).expand_as(x)
    # The clean picture of the noisiest timesteps is large, and so is the rounding of its noise.
    torch.testing.assert_close(noise, wanted, atol=1e-3 if prediction == "sample" else 1e-4, rtol=0)


def test_samples_change_and_nothing_is_left(digits_base: Path) -> None:
    place = str(digits_base)
    frozen = load_frozen(TrainConfig(base="tiny-digits", pretrained_model_name_or_path=place))

    def drawn(sampler: str) -> Tensor:
        return labelled_samples(frozen, LABELS, seed=1, steps=4, scale=2.0, sampler=sampler)

    before = {name: drawn(name) for name in ("ddim", "euler")}
    hooks = len(frozen.model._forward_hooks)
    with epsilon_scaled(frozen, 1.0):
        assert torch.equal(drawn("ddim"), before["ddim"])
    for name, plain in before.items():
        with epsilon_scaled(frozen, 1.1):
            assert not torch.allclose(drawn(name), plain)
        assert torch.equal(drawn(name), plain)
    assert len(frozen.model._forward_hooks) == hooks
    # Guidance is linear: to scale both calls is to scale the guided noise.
    with epsilon_scaled(frozen, 1.25), epsilon_scaled(frozen, 0.8):
        torch.testing.assert_close(drawn("ddim"), before["ddim"])


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_noise_and_velocity_give_the_same_pictures(sampler: str) -> None:
    """Also between the timesteps of the table, where Euler steps to."""
    pictures = []
    for prediction in ("epsilon", "v_prediction"):
        frozen = knowing(prediction)
        with epsilon_scaled(frozen, 1.02):
            pictures.append(labelled_samples(frozen, LABELS, seed=0, steps=5, sampler=sampler))
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)


def test_what_cannot_be_scaled_is_refused() -> None:
    frozen = knowing("epsilon")
    flow = replace(frozen, scheduler=FlowMatchEulerDiscreteScheduler())
    no_signal = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for base, factor, message in (
        (frozen, 0.0, "a positive number"),
        (frozen, float("nan"), "a positive number"),
        (flow, 1.01, "found digits, a flow model"),
        (replace(frozen, scheduler=no_signal), 1.01, "zero terminal SNR"),
    ):
        with pytest.raises(PatchError, match=message), epsilon_scaled(base, factor):
            raise AssertionError("it was not refused")
    assert not frozen.model._forward_hooks
    with epsilon_scaled(flow, 1.0) as plain:
        assert plain is flow
