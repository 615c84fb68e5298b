"""Distances between prediction and target against the formulas they are named after."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from training.objective.error import huber_threshold, masked_mean, prediction_error
from training.objective.noising import process_of
from training.options.loss_options import ObjectiveOptions

PREDICTION = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
T = torch.tensor([0, 200, 400, 600, 800, 999])


def error(difference: Tensor, c: float | None = None, **options: object) -> Tensor:
    threshold = None if c is None else torch.full((len(difference),), c).double()
    chosen = ObjectiveOptions(**options)
    return prediction_error(difference + 3, torch.full_like(difference, 3), chosen, threshold)


def test_l1_and_l2() -> None:
    torch.testing.assert_close(error(PREDICTION), PREDICTION.square())
    torch.testing.assert_close(error(PREDICTION, loss_type="l1"), PREDICTION.abs())


@pytest.mark.parametrize("c", [0.05, 1.0, 3.0])
def test_huber_and_smooth_l1_are_those_of_the_paper(c: float) -> None:
    root = (PREDICTION.square() + c**2).sqrt() - c
    torch.testing.assert_close(error(PREDICTION, c, loss_type="huber"), 2 * c * root)
    torch.testing.assert_close(error(PREDICTION, c, loss_type="smooth_l1"), 2 * root)


def test_huber_is_squared_for_small_and_absolute_for_large_errors() -> None:
    small, large = (torch.full((1, 1, 1, 1), x).double() for x in (1e-4, 1e4))
    assert float(error(small, 1.0, loss_type="huber")) == pytest.approx(1e-8, rel=1e-3)
    assert float(error(large, 0.1, loss_type="huber")) == pytest.approx(2 * 0.1 * 1e4, rel=1e-3)
    assert float(error(large, 0.1, loss_type="smooth_l1")) == pytest.approx(2e4, rel=1e-3)
    with pytest.raises(ValueError, match="expected a threshold for --loss_type huber"):
        error(small, loss_type="huber")


def threshold(flow: bool = False, **options: object) -> Tensor:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDPMScheduler()
    chosen = ObjectiveOptions(**{"loss_type": "huber", **options})
    found = huber_threshold(process_of(scheduler, chosen), T.float() if flow else T, chosen)
    assert found is not None and found.dtype == torch.float32
    return found


def test_schedules_are_those_of_kohya() -> None:
    alphas = diffusers.DDPMScheduler().alphas_cumprod[T]
    ratio = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(threshold(), (1 - 0.1) / (1 + ratio) ** 2 + 0.1)
    torch.testing.assert_close(
        threshold(huber_schedule="exponential", huber_c=0.2, huber_scale=3.0),
        3 * 0.2 ** (T / 1000),
    )
    constant = threshold(huber_schedule="constant", huber_c=0.2, huber_scale=3.0)
    torch.testing.assert_close(constant, torch.full((6,), 0.6))


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("schedule", ["snr", "exponential"])
def test_threshold_falls_from_one_to_huber_c(flow: bool, schedule: str) -> None:
    found = threshold(flow, huber_schedule=schedule, huber_c=0.2).tolist()
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1, abs=0.02)
    assert found[-1] == pytest.approx(0.2, abs=0.02)


def test_no_threshold_without_huber() -> None:
    chosen = ObjectiveOptions(loss_type="l1")
    assert huber_threshold(process_of(diffusers.DDPMScheduler(), chosen), T, chosen) is None


def test_masked_mean_counts_hidden_places_as_no_error() -> None:
    ones, half = torch.ones(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    half[:, :, :2] = 1
    assert masked_mean(ones, None).tolist() == [1, 1]
    assert masked_mean(ones, half).tolist() == [0.5, 0.5]
    assert masked_mean(ones, torch.zeros(2, 1, 4, 4)).tolist() == [0, 0]
