"""What repairs a rounded model without training: the controls of the study of cheap calls.

Each takes the exact base and its rounded one, and changes the rounded one. All see the same noised
training images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.base.layers import linear_layers
from training.base.rounding import GROUP, Levels, round_groups, watch_inputs
from training.experiments.cheap.calls import bytes_in_groups

Batches = Iterable[tuple[Tensor, Tensor, Given]]
_DAMPING = 0.01  # of the mean diagonal; GPTQ's own value
_MORE = 3  # bits that mixed precision may add to a layer


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's inputs x over tokens, float64.

    Args:
        mean: (I,).
        second: the mean of x x^T (I, I).
    """

    mean: Tensor
    second: Tensor

    @property
    def covariance(self) -> Tensor:
        """(I, I)."""
        return self.second - torch.outer(self.mean, self.mean)


@torch.no_grad()
def input_moments(exact: FrozenBase, batches: Batches) -> dict[str, Moments]:
    """The moments of the inputs of each linear layer in the exact model, by path."""
    rows: dict[str, list[Tensor]] = {path: [] for path in linear_layers(exact.model)}
    watch_inputs(exact, batches, lambda path, inputs: rows[path].append(inputs.double()))
    whole = {path: torch.cat(parts) for path, parts in rows.items() if parts}
    return {path: Moments(x.mean(0), x.T @ x / len(x)) for path, x in whole.items()}


@torch.no_grad()
def fit_channels(exact: FrozenBase, cheap: FrozenBase, batches: Batches) -> None:
    """Scales and shifts each output of the rounded layers as fits the exact ones best.

    Least squares for each channel over tokens of all noise levels: the scale and the shift that a
    patch without a gate could have, found layer by layer, without training and without a look at
    the timestep.
    """
    moments, originals = input_moments(exact, batches), linear_layers(exact.model)
    for path, layer in linear_layers(cheap.model).items():
        mean, covariance = moments[path].mean, moments[path].covariance
        weight, rounded = originals[path].weight.double(), layer.weight.double()
        spread = ((rounded @ covariance) * rounded).sum(1)  # (O,)
        together = ((weight @ covariance) * rounded).sum(1)
        scale = torch.where(spread > 0, together / spread, 1.0)
        fitted = scale[:, None] * rounded
        bias = 0.0 if originals[path].bias is None else originals[path].bias.double()
        shift = bias + (weight - fitted) @ mean
        layer.weight = nn.Parameter(fitted.to(layer.weight.dtype), requires_grad=False)
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=False)


@torch.no_grad()
def use_gptq(exact: FrozenBase, cheap: FrozenBase, batches: Batches, bits: int) -> None:
    """Replaces the nearest levels by GPTQ's, with as many bits and groups of the same size.

    The inputs are those of the exact model.
    """
    moments, originals = input_moments(exact, batches), linear_layers(exact.model)
    for path, layer in linear_layers(cheap.model).items():
        rounded = gptq(originals[path].weight, moments[path].second, bits)
        layer.weight = nn.Parameter(rounded, requires_grad=False)


def gptq(weight: Tensor, second: Tensor, bits: int, size: int = GROUP) -> Tensor:
    """Rounds a weight column by column; what follows makes up for the error so far.

    Args:
        weight: (O, I).
        second: the mean of x x^T over its inputs x (I, I).
        bits: 2 or more.
        size: columns that share a scale and a minimum in each row.

    Returns:
        (O, I), in the precision of the weight.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", ICLR 2023, algorithm 1; the levels of a group are those of its values when its
    first column is reached.
    """
    left, inputs = weight.double().clone(), weight.shape[1]
    diagonal = second.diagonal().mean().clamp(min=1e-12)
    damped = second.double() + _DAMPING * diagonal * torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rounded = torch.empty_like(left)
    for column in range(inputs):
        if column % size == 0:
            levels = Levels.of(left[:, column : column + size], bits)
        rounded[:, column] = levels.nearest(left[:, column : column + 1])[:, 0]
        error = (left[:, column] - rounded[:, column]) / inverse[column, column]
        left[:, column + 1 :] -= torch.outer(error, inverse[column, column + 1 :])
    return rounded.to(weight.dtype)


@torch.no_grad()
def leave_out(cheap: FrozenBase, number: int) -> None:
    """Makes a block of a DiT give what it gets, as if it were not there.

    Its modulation layer opens two gates, for attention and for the feed-forward; they stay shut.
    """
    model: Any = cheap.model
    layer: nn.Linear = model.transformer_blocks[number].norm1.linear
    open_rows = torch.ones(6, layer.out_features // 6, 1)
    open_rows[[2, 5]] = 0  # shift, scale, gate of the attention; the same of the feed-forward
    rows = open_rows.reshape(-1, 1)
    layer.weight = nn.Parameter(layer.weight * rows, requires_grad=False)
    layer.bias = nn.Parameter(layer.bias * rows[:, 0], requires_grad=False)


@torch.no_grad()
def mixed_bits(
    exact: FrozenBase, cheap: FrozenBase, batches: Batches, bits: int, added: int
) -> dict[str, int]:
    """Finds the layers where more bits help most, until a number of bytes is added.

    What a bit of a layer is worth is how much the gap of the predictions shrinks when this layer
    alone gets it, for each byte that it takes.

    Args:
        cheap: the model rounded to `bits`; it is as before afterwards.
        bits: of the rounded model.
        added: bytes.

    Returns:
        The bits of each layer by path.
    """
    originals = linear_layers(exact.model)
    worth = _worth_of_bits(exact, cheap, list(batches), bits)
    found = dict.fromkeys(originals, bits)
    while True:
        steps = {
            path: _step_bytes(originals[path], found[path])
            for path in originals
            if found[path] < bits + _MORE and _step_bytes(originals[path], found[path]) <= added
        }
        if not steps:
            break
        best = max(steps, key=lambda path: worth[path][found[path] - bits] / steps[path])
        added -= steps[best]
        found[best] += 1
    return found


@torch.no_grad()
def use_bits(exact: FrozenBase, cheap: FrozenBase, bits: Mapping[str, int]) -> None:
    """Rounds each layer, in groups, to the number of bits that is given for its path."""
    originals = linear_layers(exact.model)
    for path, layer in linear_layers(cheap.model).items():
        rounded = round_groups(originals[path].weight, bits[path])
        layer.weight = nn.Parameter(rounded, requires_grad=False)


def _step_bytes(layer: nn.Linear, bits: int) -> int:
    shape = layer.out_features, layer.in_features
    return bytes_in_groups(*shape, bits + 1) - bytes_in_groups(*shape, bits)


def _worth_of_bits(
    exact: FrozenBase, cheap: FrozenBase, batches: list[tuple[Tensor, Tensor, Given]], bits: int
) -> dict[str, list[float]]:
    """For each layer by how much each more bit shrinks the gap, one after the other."""
    targets = [exact.family.predict(exact.model, *batch) for batch in batches]

    def gap() -> float:
        own = [cheap.family.predict(cheap.model, *batch) for batch in batches]
        pairs = zip(own, targets, strict=True)
        return sum(float((a - b).double().square().mean()) for a, b in pairs)

    worth, originals, before = {}, linear_layers(exact.model), gap()
    for path, layer in linear_layers(cheap.model).items():
        kept, last, found = layer.weight, before, []
        for more in range(1, _MORE + 1):
            rounded = round_groups(originals[path].weight, bits + more)
            layer.weight = nn.Parameter(rounded, requires_grad=False)
            now = gap()
            found.append(last - now)
            last = now
        layer.weight = kept
        worth[path] = found
    return worth
