"""Weights rounded to the nearest of a few levels, and the classical correction of biases.

The rounded weights are kept as floating-point numbers: they show what a number of bits does to a
model, not how much memory or time it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.base.layers import linear_layers

GROUP = 32  # values that share a scale and a minimum, as in the types of GGUF


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Returns a weight rounded to 2^bits - 1 levels around zero, with one scale for each row.

    Args:
        weight: (O, I).
        bits: 2 or more.

    Returns:
        (O, I), in the precision of the weight.
    """
    levels = 2 ** (bits - 1) - 1  # on each side of zero
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / levels  # (O, 1)
    steps = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays one
    return ((values / steps).round() * scale).to(weight.dtype)


def round_groups(weight: Tensor, bits: int, size: int = GROUP) -> Tensor:
    """Returns a weight rounded to 2^bits levels between the extremes of each group of a row.

    Args:
        weight: (O, I).
        bits: 2 or more.
        size: values of a row that share a minimum and a scale; the last group may be shorter.

    Returns:
        (O, I), in the precision of the weight.
    """
    groups = weight.float().split(size, dim=1)
    return torch.cat([Levels.of(group, bits).nearest(group) for group in groups], dim=1).to(
        weight.dtype
    )


@dataclass(frozen=True)
class Levels:
    """2^bits levels of each row, from its minimum to its maximum.

    Args:
        lowest, scale: the first level and the distance of two (O, 1).
        count: 2^bits.
    """

    lowest: Tensor
    scale: Tensor
    count: int

    @staticmethod
    def of(group: Tensor, bits: int) -> Levels:
        """The levels between the extremes of each row of a group (O, I)."""
        lowest, highest = group.amin(dim=1, keepdim=True), group.amax(dim=1, keepdim=True)
        return Levels(lowest, (highest - lowest) / (2**bits - 1), 2**bits)

    def nearest(self, values: Tensor) -> Tensor:
        """Returns the nearest level to each of the values (O, I)."""
        steps = torch.where(self.scale > 0, self.scale, 1.0)
        numbers = ((values - self.lowest) / steps).round().clamp(0, self.count - 1)
        return numbers * self.scale + self.lowest


@torch.no_grad()
def watch_inputs(
    exact: FrozenBase,
    batches: Iterable[tuple[Tensor, Tensor, Given]],
    seen: Callable[[str, Tensor], None],
) -> None:
    """Shows what the linear layers of a base are called with.

    Args:
        batches: what `Family.predict` takes: noisy (B, C, H, W), t (B,), conditions.
        seen: is called with a layer's path and its inputs (tokens, I), for each call of it.
    """

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: seen(path, given[0].flatten(0, -2))

    layers = linear_layers(exact.model).items()
    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers]
    try:
        for noisy, t, given in batches:
            exact.family.predict(exact.model, noisy, t, given)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def correct_biases(
    cheap: FrozenBase, exact: FrozenBase, batches: Iterable[tuple[Tensor, Tensor, Given]]
) -> None:
    """Adds to the bias of each rounded layer the mean error of its output (Nagel et al. 2019).

    The error of a layer is (W - W') x on the inputs x that it has in the exact model, so that its
    mean needs the mean of x alone. A layer without a bias gets one.

    Args:
        cheap: the base with rounded weights, from `cheap_base`; it is changed.
        exact: the base itself.
        batches: what `Family.predict` takes: noisy (B, C, H, W), t (B,), conditions.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    section 4.2, with measured instead of derived means.
    """
    layers, rounded = linear_layers(exact.model), linear_layers(cheap.model)
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def seen(name: str, rows: Tensor) -> None:
        sums[name] += rows.float().sum(0).cpu()
        counts[name] += len(rows)

    watch_inputs(exact, batches, seen)
    for name, layer in rounded.items():
        if counts[name]:
            mean = (sums[name] / counts[name]).to(layer.weight.device)
            error = (layers[name].weight.float() - layer.weight.float()) @ mean  # (O,)
            before = 0.0 if layer.bias is None else layer.bias.float()
            layer.bias = nn.Parameter((before + error).to(layer.weight.dtype), requires_grad=False)
