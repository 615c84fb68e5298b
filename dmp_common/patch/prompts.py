"""The prompt pool of a site, and how a field of prompts is resized to the live grid."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common.compat import is_compiling
from dmp_common.patch.choices import Init


class PromptPool(nn.Module):
    """The prompts of one site: K grids of N prompts with D channels.

    Args:
        grids: the number of grids K.
        prompts: the number of prompts N of a grid.
        grid: rows and columns of the prompts; None where they have no place.
        coarseness: how many times the gate's grid is finer than this one, in each direction.
        width: the number of channels D.
        init: "zero", or "random" (Xavier uniform, as in the official code).
    """

    def __init__(
        self,
        grids: int,
        prompts: int,
        width: int,
        init: Init = "zero",
        grid: tuple[int, int] | None = None,
        coarseness: int = 1,
    ) -> None:
        super().__init__()
        self.grid, self.coarseness = grid, coarseness
        self.prompts = nn.Parameter(torch.zeros(grids, prompts, width))
        if init == "random":
            bound = math.sqrt(6.0 / (prompts + width))  # Xavier's bound for one grid (N, D)
            self.prompts.data.uniform_(-bound, bound)

    def mix(self, weights: Tensor) -> Tensor:
        """Computes the field of weighted prompts, sum_k w[t, k, n] * p[k, n].

        Args:
            weights: gate weights (T, K*N), float32; of the gate's grid where that is finer.

        Returns:
            The field (T, N, D), float32.
        """
        prompts = self.prompts.float()  # (K, N, D)
        if self.coarseness > 1:
            weights = self._own(weights)
        if prompts.shape[0] == 1:
            return weights.unsqueeze(-1) * prompts[0]  # (T, N, 1) * (N, D)
        shaped = weights.reshape(-1, *prompts.shape[:2])  # (T, K, N)
        return torch.einsum("tkn,knd->tnd", shaped, prompts)

    def _own(self, weights: Tensor) -> Tensor:
        """Takes the weights (T, N) of this grid from those of a finer one, which repeat them."""
        assert self.grid is not None
        step, (rows, columns) = self.coarseness, self.grid
        return weights.reshape(-1, rows * step, columns * step)[:, ::step, ::step].flatten(1)


def resize(field: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resizes a field of prompts to a live grid: bilinear, antialiased when shrinking.

    The result equals `F.interpolate(..., mode="bilinear", align_corners=False, antialias=True)`,
    which the file format prescribes. Products with two small matrices compute it, because they are
    faster and also work where `F.interpolate` does not (half precision on CPU).

    Args:
        field: (T, N, D) with N = grid[0] * grid[1].
        grid: rows and columns of the prompts.
        size: rows and columns (H, W) of the live grid.

    Returns:
        The resized field (T, H, W, D).
    """
    steps, _, width = field.shape
    rows, columns = grid
    device, kept = field.device, {} if is_compiling() else _MATRICES
    if rows != size[0]:
        down = kept.get((rows, size[0], device))  # (H, rows)
        if down is None:
            down = resize_matrix(rows, size[0], device)
        field = down @ field.reshape(steps, rows, columns * width)
    field = field.reshape(steps, size[0], columns, width)
    if columns != size[1]:
        across = kept.get((columns, size[1], device))  # (W, columns)
        if across is None:
            across = resize_matrix(columns, size[1], device)
        field = across @ field  # (T, H, W, D)
    return field


_MATRICES: dict[tuple[int, int, torch.device], Tensor] = {}


def resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Returns the matrix (target, source), float32, that resizes one direction of a field.

    Matrices are cached, one of a few kilobytes for each live size. A compiled graph computes its
    own, because it must not depend on what is cached.
    """
    if is_compiling():
        return triangle_matrix(source, target, device)
    # A matrix that was made in inference mode could not be used in a later training step.
    with torch.inference_mode(False), torch.no_grad():
        matrix = F.interpolate(
            torch.eye(source, device=device)[None, None],
            size=(target, source),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )[0, 0]
    _MATRICES[source, target, device] = matrix
    return matrix


def triangle_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Computes the matrix of `resize_matrix` with operations that a compiler can fuse."""
    scale = source / target
    centres = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    places = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    # A triangle over each target cell, at least as wide as a source cell (antialiasing).
    weights = 1 - (centres[:, None] - places).abs() / max(scale, 1.0)  # (target, source)
    weights = weights.clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
