"""The time embedding of models that compute it only inside their blocks (diffusers' DiT)."""

from __future__ import annotations

import copy
from operator import is_not
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.compat import is_compiling, is_transforming

_LIMIT = 1000  # cached embeddings, a few kilobytes each


class InnerTime:
    """Computes the time embedding with the model's own modules, before its first block runs.

    On the CPU it is cached between calls, because it costs as much as adding at four sites.

    Args:
        module: the module that embeds timesteps and labels.
        sums_labels: whether the embedding of the class labels is added (condition t+y).
    """

    def __init__(self, module: nn.Module, sums_labels: bool) -> None:
        self._module: Any = module
        self._sums_labels = sums_labels
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self._parameters: list[Tensor] = []  # those that the cached embeddings were made with

    def __call__(self, timesteps: Tensor, labels: Any, dtype: torch.dtype) -> Tensor:
        """Returns e (B, E).

        Args:
            timesteps: the timesteps of the call (B,).
            labels: its class labels (B,), which only condition t+y needs.
            dtype: the type of the model's hidden states.
        """
        module = self._module
        if self._sums_labels:
            conditioning: Tensor = module(timesteps, labels, hidden_dtype=dtype)
            return conditioning
        parameters: list[Tensor] = list(module.timestep_embedder.parameters())
        if (
            is_compiling()
            or is_transforming()
            or torch.is_grad_enabled()
            or timesteps.device.type != "cpu"
            or any(p.is_inference() for p in parameters)
        ):
            e: Tensor = module.timestep_embedder(module.time_proj(timesteps).to(dtype))
            return e
        if len(parameters) != len(self._parameters) or any(
            map(is_not, parameters, self._parameters)
        ):
            # Addresses are not enough: a new tensor may have the address of one that was freed.
            self._parameters, self._known = parameters, {}
        known = self._known
        versions = [value for p in parameters for value in (p.data_ptr(), p._version)]
        key = (*timesteps.tolist(), dtype, *versions)
        found = known.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = module.timestep_embedder(module.time_proj(timesteps.clone()).to(dtype))
            if len(known) >= _LIMIT:
                known.clear()
            known[key] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> InnerTime:
        return InnerTime(copy.deepcopy(self._module, memo), self._sums_labels)
