"""How far a prediction is from its target: place by place, and as one number for each sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.objective.noising import Process
from training.options.loss_options import LossOptions


def prediction_error(
    prediction: Tensor, target: Tensor, options: LossOptions, threshold: Tensor | None = None
) -> Tensor:
    """The error of every value (B, C, H, W), as --loss_type asks.

    With d = prediction - target and the threshold c, kohya's scripts, and this, have

        l2         d^2
        l1         |d|
        huber      2 c (sqrt(d^2 + c^2) - c)     about d^2 for small errors, 2 c |d| for large ones
        smooth_l1  2 (sqrt(d^2 + c^2) - c)       about d^2 / c, and 2 |d|

    Args:
        threshold: c (B,), from `huber_threshold`.

    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using
    Scheduled Pseudo-Huber Loss".
    """
    difference = prediction - target
    if options.loss_type == "l2":
        return difference.square()
    if options.loss_type == "l1":
        return difference.abs()
    if threshold is None:
        raise ValueError(f"expected a threshold for --loss_type {options.loss_type}, found none")
    c = threshold.reshape(-1, *[1] * (difference.ndim - 1))
    # sqrt(d^2 + c^2) - c, in a form that does not cancel where d is small.
    square = difference.square()
    error = 2 * square / ((square + c.square()).sqrt() + c)
    return c * error if options.loss_type == "huber" else error


def huber_threshold(process: Process, t: Tensor, options: LossOptions) -> Tensor | None:
    """The threshold c (B,), float32, at timesteps t (B,); None where the loss has none.

    `snr` is (1 - c) / (1 + r)^2 + c for the ratio r of noise to signal. kohya's scripts do not
    have it for flow models; here r is sigma / (1 - sigma) there, and (1 + r)^-2 = (1 - sigma)^2.
    """
    if options.loss_type in ("l2", "l1"):
        return None
    c = options.huber_c
    if options.huber_schedule == "constant":
        return torch.full_like(t, c * options.huber_scale, dtype=torch.float32)
    if options.huber_schedule == "exponential":
        return options.huber_scale * torch.exp(math.log(c) / 1000 * t.float())
    return (1 - c) * process.signal_share(t).square() + c


def masked_mean(error: Tensor, masks: Tensor | None) -> Tensor:
    """The mean (B,) of an error (B, C, H, W) times its mask (B, 1, H, W).

    As in kohya's scripts the mean is over all places: what a mask hides counts as an error of 0,
    and an image of which little is shown weighs little.
    """
    return (error if masks is None else error * masks).flatten(1).mean(1)
