"""The prompts of a modulating patch: they scale and shift the channels of modules' outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.compat import AUTOCAST
from dmp_common.patch.choices import Init

_RANDOM = 0.01  # standard deviation of random initial prompts; a scale of 1 would be far too large


class ModulationPool(nn.Module):
    """The prompts of all sites: K pairs of a scale and a shift for every channel.

    All sites share one tensor, because a model has hundreds of such sites: one product makes the
    mixtures of all of them, and an optimiser moves one tensor.

    Args:
        grids: the number of prompts K of a site.
        widths: the number of channels of each site, by name, in order.
        init: "zero" or "random".
    """

    def __init__(self, grids: int, widths: Mapping[str, int], init: Init = "zero") -> None:
        super().__init__()
        self.widths = dict(widths)
        self.prompts = nn.Parameter(torch.zeros(grids, 2, sum(self.widths.values())))
        if init == "random":
            self.prompts.data.normal_(std=_RANDOM)

    def by_site(self) -> dict[str, Tensor]:
        """Returns the prompts of each site (K, 2, D), views of the parameter."""
        return self.split(self.prompts, 2)

    def split(self, whole: Tensor, dim: int) -> dict[str, Tensor]:
        """Returns the channels of each site, views of a tensor of all channels along `dim`."""
        parts = torch.split(whole, list(self.widths.values()), dim=dim)
        return dict(zip(self.widths, parts, strict=True))

    def mix(self, weights: Tensor, equal: bool) -> Tensor:
        """Computes the scale and shift of every site, sum_k w_k(t) [s_k ; b_k].

        Args:
            weights: gate weights (T, S, 2 K), float32; those of a pair are equal.
            equal: whether the weights are the same at all sites, because the gate sees no depth.

        Returns:
            (T, 2, C), float32, of the channels of all sites: the scale s(t) and the shift b(t).
        """
        if weights.device.type not in AUTOCAST:
            return self._mix(weights, equal)
        with torch.autocast(weights.device.type, enabled=False):
            return self._mix(weights, equal)

    def _mix(self, weights: Tensor, equal: bool) -> Tensor:
        prompts = self.prompts.float()
        weights = weights[:, :, ::2]  # (T, S, K)
        if equal:
            return torch.einsum("tk,kpc->tpc", weights[:, 0], prompts)
        repeats = torch.tensor(list(self.widths.values()), device=weights.device)
        by_channel = weights.repeat_interleave(repeats, dim=1, output_size=prompts.shape[2])
        return torch.einsum("tck,kpc->tpc", by_channel, prompts)
