"""Trains a patch so that a cheap call predicts what the exact call predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from comfyui_dmp.states import States
from dmp_common import PatchError
from dmp_common.patch.levels import RelativeWeights, gap_weights, level_means
from dmp_common.patch.objectives import squared_distance
from dmp_common.patch.patch import Patch

# The prediction (B, ...) of the cheap call with the patch, for states of one conditioning.
Predict = Callable[[int, States], Tensor]
# Told the number of steps done and the loss of the last one; returns whether to go on.
Told = Callable[[int, float], bool]

_CLIPPED = 1.0  # longest gradient
_MEASURED = 512  # states at which the gap is measured before training
_ROUNDING = 1e-5  # a gap of at most this size is what calls of other batches round otherwise
_RATE = 0.02  # times the size of the gap, see `suited_rate`
_HIGHEST_RATE = 0.005
_LOSS_SCALE = 2.0**12  # in half precision, where small gradients would become 0
_TRIES = 12  # how often that scale is halved until the gradients are finite


@dataclass(frozen=True)
class Recipe:
    """How a patch is trained: AdamW, with a cosine schedule after a warm-up.

    Args:
        steps: the number of optimiser steps.
        learning_rate: the greatest one; 0 for the one that suits the gap, see `suited_rate`.
        warmup: in so many steps the learning rate rises to it.
    """

    steps: int
    learning_rate: float
    warmup: int

    def factor(self, step: int) -> float:
        """The factor of the learning rate in a step, counted from 0."""
        if step < self.warmup:
            return step / max(self.warmup, 1)
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Gap:
    """How far the cheap call is from the exact one before training.

    Args:
        weights: of timesteps; with them the gap counts alike at every noise level.
        mean: the mean squared distance with these weights.
        size: the root of the mean squared distance, as a share of the predictions' own size.
    """

    weights: RelativeWeights
    mean: float
    size: float


def suited_rate(size: float) -> float:
    """Returns a learning rate that suits the size of a gap.

    A step of Adam moves each value by the learning rate, however small the gradient is. At the
    rate that suits a model in 4 bits the steps alone move the predictions by more than the gap of
    a model in 8 bits.

    Args:
        size: see `Gap`.

    >>> suited_rate(0.05), suited_rate(0.8)
    (0.001, 0.005)
    """
    return min(_RATE * size, _HIGHEST_RATE)


@torch.no_grad()
def distances(predict: Predict, states: States, at_once: int) -> tuple[Tensor, Tensor]:
    """Returns the timesteps of states, and the squared distances of the predictions there (N,).

    Args:
        predict: the cheap call.
        states: with the exact predictions.
        at_once: states of one call.
    """
    times, errors = [], []
    for number, own in states.by_condition():
        for rows in torch.arange(len(own)).split(at_once):
            part = own.at(rows)
            predicted = predict(number, part)
            times.append(part.t)
            errors.append(squared_distance(predicted, part.target.to(predicted.device)).cpu())
    return torch.cat(times), torch.cat(errors)


def measured_gap(predict: Predict, states: States, seed: int, at_once: int = 8) -> Gap:
    """Measures how far the cheap call is from the exact one before training.

    Args:
        predict: the cheap call.
        states: with the exact predictions.
        seed: of the choice of states.
        at_once: states of one call.

    Raises:
        PatchError: there is no gap, or it is not finite.
    """
    source = torch.Generator().manual_seed(seed)
    chosen = states.at(torch.randperm(len(states), generator=source)[:_MEASURED])
    times, gaps = distances(predict, chosen, at_once)
    means = level_means(times, gaps)
    if not bool(means.isfinite().all()):
        raise PatchError(
            "expected finite predictions of both models, found NaN or infinity: does each draw "
            "pictures by itself?"
        )
    size = float((gaps.mean() / chosen.target.square().mean()).sqrt())
    if not size > _ROUNDING:
        raise PatchError(
            "expected a cheap model that differs from the exact one, found equal predictions: "
            "connect the quantised model as MODEL and the full one as TEACHER MODEL, or choose "
            "the objective guidance."
        )
    weights = gap_weights(means)
    mean = float((gaps * weights(times)).mean())
    return Gap(weights, mean, size)


def weighted_gap(
    predict: Predict, states: States, weights: RelativeWeights, at_once: int = 8
) -> float:
    """Returns the mean squared distance of the predictions at states, with weights.

    Args:
        predict: the cheap call.
        states: with the exact predictions.
        weights: see `Gap`.
        at_once: states of one call.
    """
    times, errors = distances(predict, states, at_once)
    return float((errors * weights(times)).mean())


def fit(
    patch: Patch,
    predict: Predict,
    states: States,
    numbers: Iterable[Tensor],
    recipe: Recipe,
    weights: RelativeWeights,
    told: Told,
    half: bool = False,
) -> None:
    """Trains a patch, in place.

    Args:
        patch: in training mode, on the device of the predictions.
        predict: the cheap call with the patch.
        states: with the exact predictions.
        numbers: which states each step sees, see `comfyui_dmp.states.batches`.
        recipe: steps and learning rate.
        weights: of timesteps.
        told: is called after each step, and may end the training.
        half: whether the gradients pass through half precision.

    Raises:
        PatchError: a loss is not finite.
    """
    parameters = list(patch.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.factor)
    scale = _LOSS_SCALE if half else 1.0
    for step, rows in zip(range(recipe.steps), numbers, strict=False):
        batch = states.at(rows)
        for _ in range(_TRIES):
            loss = _backward(predict, batch, weights, scale)
            norm = _unscaled(parameters, scale)
            if scale == 1.0 or math.isfinite(norm) or not math.isfinite(loss):
                break
            scale /= 2
            optimiser.zero_grad()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise PatchError(
                f"expected a finite loss and gradient, found {loss:g} and {norm:g} in step "
                f"{step + 1}: lower the learning rate."
            )
        torch.nn.utils.clip_grad_norm_(parameters, _CLIPPED)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if not told(step + 1, loss):
            return


def _backward(predict: Predict, batch: States, weights: RelativeWeights, scale: float) -> float:
    """Adds up the gradients of a batch, one conditioning after the other; returns its loss."""
    total = 0.0
    for number, states in batch.by_condition():
        predicted = predict(number, states)
        errors = squared_distance(predicted, states.target.to(predicted.device))
        loss = (weights(states.t).to(errors.device) * errors).sum() / len(batch)
        (loss * scale).backward()
        total += float(loss.detach())
    return total


def _unscaled(parameters: list[torch.nn.Parameter], scale: float) -> float:
    """Divides gradients by the scale of the loss; returns their norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1.0:
        for gradient in gradients:
            gradient.div_(scale)
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())
