"""What is logged about a patch and the model or the call that it is used with."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from comfyui_dmp.model import zero_terminal_snr
from dmp_common.attach.experts import on_other_expert
from dmp_common.attach.record import PatchRecord
from dmp_common.patch.noise import unlike_noise
from dmp_common.tools.use import cheap_types, unlike_cheap
from dmp_common.tools.weighttypes import weight_types

_log = logging.getLogger(__name__)
_CONDITIONAL = 0  # ComfyUI's number of the positive condition in `cond_or_uncond`


def conditional_items(options: dict[str, Any], items: int) -> Tensor | None:
    """Returns which items of a call are conditional (B,), None where all are.

    Args:
        options: the `transformer_options` of the call. Their `cond_or_uncond` has a number for each
            of the equal parts of the batch: 0 for the positive condition.
        items: the number of items B.
    """
    kinds = options.get("cond_or_uncond") or [_CONDITIONAL]
    if all(kind == _CONDITIONAL for kind in kinds) or items % len(kinds):
        return None
    conditional = torch.tensor([kind == _CONDITIONAL for kind in kinds])
    return conditional.repeat_interleave(items // len(kinds))


def say_unlike(denoiser: nn.Module, record: PatchRecord) -> None:
    """Logs a warning for a repair patch on a model that it was not made for.

    Args:
        denoiser: the UNet or transformer of the model.
        record: the patch.
    """
    metadata = record.loaded.patch.metadata
    if cheap_types(metadata):
        why = unlike_cheap(metadata, weight_types(denoiser))
        if why is not None:
            _log.warning("DMP: %s: %s.", record.loaded.name, why)


def say_other_noise(model_sampling: Any, record: PatchRecord) -> None:
    """Logs a warning for a patch that was trained on another noise schedule.

    Args:
        model_sampling: ComfyUI's object of this name.
        record: the patch.
    """
    why = unlike_noise(record.loaded.patch.metadata, zero_terminal_snr(model_sampling))
    if why is not None:
        _log.warning("DMP: %s: %s.", record.loaded.name, why)


class OtherExpert:
    """Says once a sampling that a patch for one of two experts is probably on the other one.

    Args:
        record: the patch.
    """

    def __init__(self, record: PatchRecord) -> None:
        self._name, self._variant = record.loaded.name, record.loaded.patch.variant
        self._told: object = None

    def __call__(self, timesteps: Tensor, options: dict[str, Any]) -> None:
        """Logs a warning for timesteps of the other expert.

        Args:
            timesteps: of a call, of which those of clean frames (0) do not count.
            options: its `transformer_options`.
        """
        sampling = options.get("sample_sigmas")
        if self._told is None or self._told is not sampling:
            why = on_other_expert(self._variant, float(timesteps.max()))
            if why is not None:
                self._told = sampling if sampling is not None else self
                _log.warning("DMP: %s: %s.", self._name, why)


class SecondCall:
    """Says once a sampling that a guidance patch needs no second call.

    Args:
        record: the patch.
    """

    def __init__(self, record: PatchRecord) -> None:
        self._name = record.loaded.name
        self._told: object = None

    def __call__(self, options: dict[str, Any]) -> None:
        """Logs a warning for the first call of a sampling that has unconditional items.

        Args:
            options: the `transformer_options` of such a call. Each sampling has its own tensor of
                noise levels in them.
        """
        sampling = options.get("sample_sigmas")
        if self._told is None or self._told is not sampling:
            self._told = sampling if sampling is not None else self
            _log.warning(
                "DMP: %s takes the place of the second call of guidance, and this sampling makes "
                "that call too: set CFG to 1 (its strength is the guidance).",
                self._name,
            )
