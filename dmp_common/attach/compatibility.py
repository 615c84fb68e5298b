"""Checks that a patch fits a model, in one function for diffusers and for every host."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from dmp_common.attach.settings import Settings
from dmp_common.bases.base import find_module
from dmp_common.bases.detect import require_base
from dmp_common.bases.parts import Naming
from dmp_common.bases.timesteps import frequency_shift
from dmp_common.errors import PatchError
from dmp_common.patch.noise import ends_in_pure_noise
from dmp_common.patch.variant import Variant

_NOISIEST = (500.0, 1001.0)  # where timesteps run from 1000 (noise) to 0, the first is in between
# Schedulers of diffusers whose names begin so have another scale: a function of sigma, or 1 to 0.
_OTHER_TIMESTEPS = ("EDM", "IPNDM", "CMStochastic", "KarrasVe", "ScoreSde", "CosineDPM")


def require_compatible(
    denoiser: nn.Module,
    variant: Variant,
    *,
    naming: Naming | None = None,
    prediction: str | None = None,
    noisiest: float | None = None,
) -> Naming:
    """Refuses a model that a patch was not made for.

    Args:
        denoiser: the UNet or transformer itself.
        variant: the configuration of the patch.
        naming: the naming of the host's models; None accepts both.
        prediction: what the model predicts; None if it is not known.
        noisiest: the timestep at which the host begins with pure noise; None if it is not known.

    Returns:
        The naming of the model.

    Raises:
        PatchError: the model is of another base. Otherwise one message names all that does not fit:
            the frequency shift of the time embedding, the prediction type, the scale of timesteps,
            prompts that are prepended.
    """
    found = require_base(denoiser, variant.base_spec, naming)
    problems = []
    if variant.mix == "prepend" and found != "diffusers":
        problems.append(
            "expected a patch that adds its prompts, found one that prepends them, which only the "
            "trainer can do: use a patch that adds them (mix = add)"
        )
    if variant.mix == "modulate":
        problems += _unfit_outputs(denoiser, variant, found)
    shift = frequency_shift(denoiser, variant.base_spec, found)
    if shift != variant.frequency_shift:
        problems.append(
            f"expected a time embedding of frequency shift {variant.frequency_shift:g}, found "
            f"{shift:g} in this model: load the model from the original weights (shift 0), or with "
            "the library it was trained with, or use a patch that was trained on it"
        )
    if prediction is not None and prediction != variant.prediction:
        problems.append(
            f"expected a model with prediction type {variant.prediction}, found {prediction}: load "
            "the model that the patch was trained for, or a patch for this one; if it is that "
            "model, set its prediction type (in ComfyUI with a ModelSampling node, in diffusers in "
            "the scheduler's configuration)"
        )
    elif noisiest is not None and not _NOISIEST[0] < noisiest <= _NOISIEST[1]:
        problems.append(
            f"expected a model with timesteps from 1000 (noise) to 0, found one that starts at "
            f"{noisiest:g}: use the model sampling the patch was trained with"
        )
    if problems:
        raise PatchError("; and ".join(problems) + ".")
    return found


def _unfit_outputs(denoiser: nn.Module, variant: Variant, naming: Naming) -> list[str]:
    """Describes the outputs that a model does not have where a modulating patch needs them."""
    missing = [
        site.paths[naming]
        for site in variant.site_specs()
        if find_module(denoiser, site.paths[naming]) is None
    ]
    problems = []
    if missing:
        problems.append(
            f"expected modules at {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, "
            "found none: use the model as its usual loader makes it"
        )
    # diffusers keeps the single projections beside the fused one, but calls them no longer.
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        problems.append(
            "expected attention with single projections, found fused ones: call "
            "`unfuse_qkv_projections()` before attaching this patch"
        )
    return problems


def prediction_of_scheduler(scheduler: Any) -> str | None:
    """Returns what the model of a diffusers pipeline predicts, or None if it is not known.

    Args:
        scheduler: the pipeline's scheduler, or None.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        return None
    said: str | None = config.get("prediction_type")
    if said is None:
        # Flow matching schedulers have one prediction type only. Others (IPNDM) do not state it.
        return "flow" if type(scheduler).__name__.startswith("FlowMatch") else None
    return "flow" if said == "flow_prediction" else said


def zero_terminal_snr_of_scheduler(scheduler: Any) -> bool | None:
    """Tells whether the schedule of a diffusers pipeline ends in pure noise.

    It is None where there is no table of a schedule, as in flow models.

    Args:
        scheduler: the pipeline's scheduler, or None.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return ends_in_pure_noise(alphas) if isinstance(alphas, Tensor) else None


def require_timesteps_of_scheduler(scheduler: Any, variant: Variant, settings: Settings) -> None:
    """Refuses a strength that depends on the timestep, if timesteps do not run from 1000 to 0.

    EDM schedulers (Playground 2.5) call the model with c_noise, a quarter of the logarithm of
    sigma, so that a schedule would act at other timesteps than it says.

    Raises:
        PatchError: the patch or its settings act at some timesteps only, and the scheduler has
            another scale.
    """
    name = type(scheduler).__name__
    if settings.needs_timesteps(variant.timesteps) and name.startswith(_OTHER_TIMESTEPS):
        raise PatchError(
            f"expected a scheduler that counts timesteps from 1000 (noise) to 0 for a schedule, or "
            f"for a patch of a part of the timesteps, found {name}: use another scheduler, or a "
            "patch and settings that act at all timesteps."
        )
