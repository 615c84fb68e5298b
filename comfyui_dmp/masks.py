"""Brings a patch's mask to each call of a ComfyUI model, cropped and batched as the latents are."""

from __future__ import annotations

import itertools
from typing import Any

import torch.nn.functional as functional
from comfy.conds import CONDNoiseShape
from torch import Tensor

from dmp_common import PatchError

_numbers = itertools.count()


class MaskOfCalls:
    """A wrapper of ComfyUI's calculation of conditions that adds the mask to each of them.

    ComfyUI then crops the mask to the area of a condition and repeats it for the items of a batch,
    as it does with the pictures of inpainting models.

    Args:
        mask: (B or 1, H, W), from 0 to 1, as ComfyUI's MASK.

    Raises:
        PatchError: the mask has another shape.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dim() == 2:
            mask = mask[None]
        if mask.dim() != 3 or not mask.numel():
            raise PatchError(
                f"expected a mask (B, H, W), found {tuple(mask.shape)}: connect a MASK output."
            )
        self._mask = mask.detach().float().clamp(0.0, 1.0)[:, None]  # (B, 1, H, W)
        self._name = f"dmp_mask_{next(_numbers)}"  # Several masked patches may be on one model.

    def __call__(
        self,
        executor: Any,
        model: Any,
        conds: list[list[dict[str, Any]] | None],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """Calculates the conditions of a step, each with the mask.

        Args:
            executor: calls the next wrapper; the last one calls ComfyUI's own function.
            model: ComfyUI's `BaseModel`.
            conds: the conditions, which are not changed.
            x: noisy latents of the whole picture (B, C, ..., H, W).
            timestep, options: passed on as they are.
        """
        mask = self._sized(x)
        shaped = CONDNoiseShape(mask.reshape(len(mask), 1, *[1] * (x.dim() - 4), *mask.shape[2:]))

        def masked(cond: dict[str, Any]) -> dict[str, Any]:
            return {**cond, "model_conds": {**cond["model_conds"], self._name: shaped}}

        conds = [each and [masked(cond) for cond in each] for each in conds]
        return executor(model, conds, x, timestep, options)

    def taken(self, conds: dict[str, Any], x: Tensor) -> Tensor:
        """Takes the mask out of the arguments of a call of the model, which does not know it.

        Args:
            conds: the arguments by name; the mask is removed from them.
            x: noisy latents of the call.

        Returns:
            The mask (B or 1, 1, H, W). Where a sampler calls the model in its own way, it is the
            whole mask in the size of x.
        """
        mask: Tensor | None = conds.pop(self._name, None)
        if mask is None:
            return self._sized(x)
        return mask.reshape(len(mask), 1, *mask.shape[-2:]).to(x.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskOfCalls:
        return self

    def _sized(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return functional.interpolate(self._mask.to(x.device), size, mode="area")
