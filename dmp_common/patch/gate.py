"""The gate: it turns the time embedding (T, E) and each site's depth into weights (T, S, N)."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common.compat import AUTOCAST, is_compiling
from dmp_common.patch.variant import ATTENTION_WIDTH, Variant

HARD_SHARE = 0.75  # the share of the prompts that a hard gate keeps (paper, Table 4)


class Gate(nn.Module):
    """The gate of a patch. It computes the weights of all sites at once, in float32.

    "linear" is eq. 3: softmax(G([e ; i])), where G is one linear layer that all sites share.
    "attention" compares a query W_q [e ; i] with one learned key per prompt. Both start with equal
    weights.

    Two variants are our own, not the paper's, and are recorded in the file: with gate unit "grid"
    one logit weights a whole grid of prompts; with gate form "residual" a weight is 1 + its logit
    instead of a softmax.

    Args:
        variant: the configuration of the patch.
        embedding: the size E of the time embedding.

    Source: Ham et al. 2025, eq. 3 and Table 4.
    """

    def __init__(self, variant: Variant, embedding: int) -> None:
        super().__init__()
        self.variant = variant
        depths = variant.depths
        self._depths = [float(depths[name]) for name in variant.sites]
        # Sites whose grid is coarser than the gate's, by how many times.
        self._coarse = {
            column: variant.coarseness(site)
            for column, site in enumerate(variant.site_specs())
            if variant.coarseness(site) > 1
        }
        self._depths_on: dict[torch.device, Tensor] = {}
        count = variant.outputs
        inputs = embedding + (variant.gate_inputs == "e+i")
        if variant.gate == "linear":
            self.weight = nn.Parameter(torch.zeros(count, inputs))
            self.bias = nn.Parameter(torch.zeros(count))
            if variant.gate_init == "random":
                nn.init.xavier_uniform_(self.weight)
                if variant.gate_form == "residual":
                    # The depth is a large input. A softmax bears the large logits that it causes;
                    # here they would be weights, and those of the last sites would dominate.
                    self.weight.data[:, embedding:] = 0.0
        elif variant.gate == "attention":
            # If both factors were zero, neither would ever receive a gradient.
            self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(ATTENTION_WIDTH, inputs)))
            self.key = nn.Parameter(torch.zeros(count, ATTENTION_WIDTH))
            if variant.gate_init == "random":
                nn.init.xavier_uniform_(self.key)

    def logits(self, e: Tensor) -> Tensor:
        """Computes the gate's logits before the softmax.

        Args:
            e: time embedding (T, E).

        Returns:
            (T, S, K*N), or (T, S, K) with gate unit "grid"; float32.
        """
        if e.device.type not in AUTOCAST:
            return self._logits(e.float())
        with torch.autocast(e.device.type, enabled=False):
            return self._logits(e.float())

    def _logits(self, e: Tensor) -> Tensor:
        # A compiled graph must not depend on what is cached.
        depths = None if is_compiling() else self._depths_on.get(e.device)
        if depths is None:
            depths = self.depths(e.device)  # (S,)
        if self.variant.gate == "linear":
            return _affine(e, depths, self.weight.float()) + self.bias.float()
        if self.variant.gate == "attention":
            query = _affine(e, depths, self.query.float())  # (T, S, 64)
            return query @ self.key.float().T / math.sqrt(ATTENTION_WIDTH)
        raise ValueError("a patch without gate has no logits")

    def forward(self, e: Tensor, temperature: float = 1.0) -> Tensor:
        """Computes the gate's weights.

        Args:
            e: time embedding (T, E).
            temperature: divides the logits; above 1 it makes the weights more equal.

        Returns:
            w (T, S, K*N), float32; with gate unit "grid" the weights within a grid are equal. Soft
            weights sum to 1 over the prompts (or over the grids; with grid scope "site" over a
            site's own prompts, each of them repeated for the cells it covers); hard weights are 0
            or 1, with the gradient of the softmax; residual weights are 1 + logit; without a gate
            all are 1.
        """
        if self.variant.gate == "none":
            return e.new_ones(1, 1, 1, dtype=torch.float32).expand(
                e.shape[0], len(self._depths), self.variant.count
            )
        logits = self.logits(e)
        scaled = logits if temperature == 1.0 else logits / temperature
        if self.variant.gate_form == "residual":
            return self._spread(1.0 + scaled)
        soft = self._pooled(scaled) if self._coarse else scaled.softmax(-1)
        if self.variant.selection == "soft":
            return self._spread(soft)
        kept = logits.topk(kept_prompts(self.variant.count), dim=-1).indices
        mask = torch.zeros_like(soft).scatter(-1, kept, 1.0)
        return mask + (soft - soft.detach())  # exactly the mask; the bracket is exactly 0

    def depths(self, device: torch.device) -> Tensor:
        """Returns the depth index i of each site of the patch (S,), float32.

        They are cached for each device, because a copy makes the CPU wait for the GPU.
        """
        with torch.inference_mode(False):
            depths = torch.tensor(self._depths, dtype=torch.float32, device=device)
        if not is_compiling():
            self._depths_on[device] = depths
        return depths

    @torch.no_grad()
    def begin_with_stages(self, e: Tensor) -> None:
        """Fits the gate so that each grid has weight 1 at its own timestep and 0 at the others'.

        The K timesteps are spread evenly over those of the patch, first and last included, and the
        weights are linear in between; the gate is fitted to them by least squares. The prompts are
        still zero, so the patch changes nothing yet, but from the first step on each grid learns
        from its own noise levels.

        Args:
            e: time embedding (T, E) at timesteps spread evenly over the schedule, T >= E.
        """
        places = torch.linspace(0, 1000, e.shape[0], dtype=torch.float64)[:, None]
        low, high = self.variant.timesteps
        grids = self.variant.grids
        knots = torch.linspace(low, high, grids, dtype=torch.float64)
        distances = (places - knots).abs() / (high - low)
        weights = (1 - distances * (grids - 1)).clamp(min=0)  # (T, K); 1 for one grid
        inputs = torch.cat([e.detach().cpu().double(), torch.ones_like(places)], dim=1)
        fitted = torch.linalg.lstsq(inputs, weights - 1.0, driver="gelsd", rcond=3e-3).solution
        self.weight.zero_()
        self.weight[:, : e.shape[1]].copy_(fitted[:-1].T)
        self.bias.copy_(fitted[-1])

    def _pooled(self, logits: Tensor) -> Tensor:
        """Returns the softmax (T, S, N) of each site over its own prompts, repeated over cells."""
        assert self.variant.grid is not None
        placed = logits.reshape(*logits.shape[:2], *self.variant.grid)  # (T, S, rows, columns)
        sites = []
        for column, site in enumerate(placed.unbind(1)):
            times = self._coarse.get(column, 1)
            own = F.avg_pool2d(site, times)  # (T, rows / times, columns / times)
            soft = own.flatten(1).softmax(-1).reshape(own.shape)
            sites.append(soft.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1))
        return torch.stack(sites, 1)

    def _spread(self, weights: Tensor) -> Tensor:
        """Returns weights of prompts (T, S, K*N); weights of grids (T, S, K) are repeated."""
        if self.variant.gate_unit == "prompt":
            return weights
        return weights.repeat_interleave(self.variant.prompts, dim=-1)


def kept_prompts(count: int) -> int:
    """Returns how many of `count` prompts a hard gate and the load loss keep: 75 %, at least 1."""
    return max(int(HARD_SHARE * count), 1)


def _affine(e: Tensor, depths: Tensor, weight: Tensor) -> Tensor:
    """Computes weight [e ; i] for every pair of timestep and site, without building the pairs."""
    embedding = e.shape[-1]
    by_time = e @ weight[:, :embedding].T  # (T, out)
    if weight.shape[1] == embedding:
        return by_time[:, None].expand(-1, depths.shape[0], -1)
    return by_time[:, None] + depths[None, :, None] * weight[:, embedding]  # (T, S, out)
