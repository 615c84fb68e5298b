"""Bases of two experts: which one a patch is for, and whether it is on that one.

Wan 2.2 A14B has a model for high noise and one for low noise, of one architecture, so that a patch
runs on either. The file says which one it was made for. A pipeline of diffusers names its experts;
of a model alone only the timesteps tell that it is the other one.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn as nn
from torch import Tensor

from dmp_common.bases.detect import find_denoiser
from dmp_common.errors import PatchError
from dmp_common.patch.variant import Variant

_PLACES = {"high": "transformer", "low": "transformer_2"}  # of the experts in a pipeline


def experts_of(model: Any) -> dict[str, nn.Module]:
    """Returns the experts of a pipeline, "high" and "low"; it is empty for every other model."""
    found = {expert: getattr(model, place, None) for expert, place in _PLACES.items()}
    if not isinstance(found["low"], nn.Module):
        return {}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def denoisers_of(model: Any) -> list[nn.Module]:
    """Returns all models of a pipeline that a patch may be on; compiled ones too."""
    return [find_denoiser(each, compiled=True) for each in experts_of(model).values() or (model,)]


def expert_for(model: Any, variant: Variant) -> Any:
    """Returns the expert of a pipeline that a patch is for, or the model itself.

    Args:
        model: a pipeline, or a model.
        variant: the configuration of the patch.

    Raises:
        PatchError: the pipeline has two experts and the patch does not say for which one it is, or
            the pipeline does not have that one.
    """
    experts = experts_of(model)
    if not experts:
        return model
    if variant.expert is None:
        raise PatchError(
            "expected a patch that says for which of the pipeline's two experts it is, found one "
            "that was made for a model without experts: use a patch for one of them, or attach "
            "this one to the pipeline's `transformer` (high noise) or `transformer_2` (low noise)."
        )
    if variant.expert not in experts:
        raise PatchError(
            f"expected a pipeline with the expert for {variant.expert} noise in "
            f"`{_PLACES[variant.expert]}`, found none there: load the whole pipeline."
        )
    return experts[variant.expert]


def on_other_expert(variant: Variant, timestep: float) -> str | None:
    """Says in a sentence that a patch is probably on the other expert; None where it may be right.

    Where hosts switch between the experts is the user's choice, so only timesteps in the outer half
    of the other expert's own tell.

    Args:
        variant: the configuration of the patch.
        timestep: of a call, on the scale 0..1000.
    """
    switch = variant.base_spec.switch
    if variant.expert is None or switch is None:
        return None
    wrong = timestep < switch / 2 if variant.expert == "high" else timestep > (switch + 1000) / 2
    if not wrong:
        return None
    return (
        f"the patch is for the expert for {variant.expert} noise, which takes timesteps "
        f"{'above' if variant.expert == 'high' else 'below'} {switch:g}, and this model is called "
        f"with {timestep:.0f}: put it on the other model of the pair"
    )


class ExpertWatch:
    """Warns once when a patch for one expert is called at timesteps of the other.

    Args:
        variant: the configuration of the patch.
    """

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._told = False

    def __call__(self, timesteps: Tensor) -> None:
        """Looks at the timesteps of a call, of which those of clean frames (0) do not count."""
        if not self._told:
            why = on_other_expert(self._variant, float(timesteps.max()))
            if why is not None:
                self._told = True
                warnings.warn(f"DMP: {why}.", stacklevel=2)
