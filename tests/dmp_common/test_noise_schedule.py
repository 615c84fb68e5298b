"""A patch on a model whose noise schedule is not that of its training: what is said, and where."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch

from dmp_common import Patch, attach
from dmp_common.attach.compatibility import zero_terminal_snr_of_scheduler
from dmp_common.patch.noise import ends_in_pure_noise, is_pure_noise, unlike_noise
from tests.tiny import FAMILIES

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD15 = FAMILIES["sd15"]


def trained(zero_terminal_snr: object) -> Patch:
    patch = SD15.patch()
    patch.metadata["dmp.use"] = json.dumps({"zero_terminal_snr": zero_terminal_snr})
    return patch


@pytest.mark.parametrize("own", [True, False])
def test_another_noise_schedule_is_named(own):
    metadata = trained(own).metadata
    assert unlike_noise(metadata, own) is unlike_noise(metadata, None) is None
    why = unlike_noise(metadata, not own)
    named = ["with zero terminal SNR", "without zero terminal SNR"]
    first, second = named if own else named[::-1]
    assert f"a noise schedule {first}, and this model has one {second}: use a model" in why
    for silent in ({}, trained(None).metadata, trained("yes").metadata):
        assert unlike_noise(silent, True) is None


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("rescaled", [True, False])
def test_schedulers_of_diffusers_tell(name, rescaled):
    """Some of them stop a little before pure noise."""
    scheduler = getattr(diffusers, name)(**BETAS, rescale_betas_zero_snr=rescaled)
    assert zero_terminal_snr_of_scheduler(scheduler) is rescaled
    assert zero_terminal_snr_of_scheduler(diffusers.FlowMatchEulerDiscreteScheduler()) is None
    assert zero_terminal_snr_of_scheduler(None) is None


def test_numbers_of_the_hosts():
    """ComfyUI's sigmas, and the last value of A1111's rescaled table, in half precision too."""
    assert is_pure_noise(4518.0) and not is_pure_noise(14.6)
    last = torch.tensor([0.9, 4.8973451890853435e-08])
    assert ends_in_pure_noise(last) and ends_in_pure_noise(last.half())
    assert not ends_in_pure_noise(torch.tensor([0.9, 0.0047]))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_attaching_to_a_pipeline_of_the_other_kind_warns(own, rescaled):
    """At the caller's line; a model without its pipeline does not tell."""
    scheduler = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=rescaled)
    pipe, patch = SimpleNamespace(unet=SD15.model(), scheduler=scheduler), trained(own)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attach(pipe.unet, patch).remove()
        attach(pipe, patch).remove()
    assert len(said) == (own is not rescaled)
    for warning in said:
        assert "DMP: the patch was trained on a noise schedule with" in str(warning.message)
        assert warning.filename == __file__
