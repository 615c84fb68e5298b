"""The losses of a training step: denoising with the frozen base, and the method's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.methods.method import Method
from training.objective.error import huber_threshold, masked_mean, prediction_error
from training.objective.noising import Process
from training.objective.relative import RelativeWeights
from training.options.config import TrainConfig


class Student(nn.Module):
    """The base with what is trained: one module, so that any wrapper sees both.

    Args:
        frozen: the base, with the method on it.
        method: what is trained; None for the base alone.
        process: how data become noisy.
        config: weights of the losses.

    Attributes:
        relative: weights of timesteps for --relative_loss, None without.
    """

    def __init__(
        self, frozen: FrozenBase, method: Method | None, process: Process, config: TrainConfig
    ) -> None:
        super().__init__()
        self.backbone = frozen.model
        self.method = method
        self._frozen = frozen
        self._process = process
        self._config = config
        self.relative: RelativeWeights | None = None

    def train(self, mode: bool = True) -> Student:
        """Sets the mode of the method alone: in training mode the base would drop labels."""
        super().train(mode)
        if mode:
            self.backbone.eval()
        return self

    def forward(
        self,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        given: Given,
        weights: Tensor | None,
        step: int,
        masks: Tensor | None = None,
        entering: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            clean, noise: (B, C, H, W).
            t: (B,), on the scale 0..1000.
            given: the conditions of the samples, tensors (B, ...) by name.
            weights: (B,) of the samples, None if all are 1.
            step: the micro-step, which seeds the draws of the balancing losses.
            masks: (B, 1, H, W), how much each place counts; None if all count alike.
            entering: (B, C, H, W), the noise of the model's input where it is perturbed; None
                where it is `noise`, which the target knows.

        Returns:
            "loss", the weighted sum; its parts "denoising", "variational", "importance" and
            "load", where there are such; and "samples" (B,), the loss of each sample.
        """
        parts = self._denoising(clean, noise, t, given, masks, entering)
        scale = self._process.weights(t)
        if self.relative is not None:
            scale = scale * self.relative(t)
        if weights is not None:
            scale = scale * weights
        losses = {"samples": scale * parts["denoising"]}
        losses["denoising"] = losses["samples"].mean()
        if "variational" in parts:
            term = parts["variational"]
            losses["variational"] = (term if weights is None else term * weights).mean()
        if self.method is not None:
            losses |= self.method.own_losses(given, step)
        return {"loss": self._weighted_sum(losses), **losses}

    def _weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses that are there, each times its weight."""
        config, total = self._config, losses["denoising"].new_zeros((), dtype=torch.float32)
        factors = {
            "denoising": 1.0,
            "variational": config.variational_weight,
            "importance": config.importance_weight,
            "load": config.load_weight,
        }
        for name, factor in factors.items():
            if name in losses:
                total = total + factor * losses[name]
        return total

    def squared_error(
        self, clean: Tensor, noise: Tensor, t: Tensor, given: Given, masks: Tensor | None = None
    ) -> Tensor:
        """The squared error (B,) of each sample, unweighted: the measure of held-out images.

        It is the same for every --loss_type, so that runs with different ones can be compared.
        """
        noisy = self._process.noisy(clean, noise, t)
        prediction = self._output(noisy, t, given)[:, : clean.shape[1]]
        target = self._process.target(clean, noise, t).float()
        return masked_mean((prediction - target).square(), masks)

    def _denoising(
        self,
        clean: Tensor,
        noise: Tensor,
        t: Tensor,
        given: Given,
        masks: Tensor | None,
        entering: Tensor | None,
    ) -> dict[str, Tensor]:
        """Losses (B,) of each sample before weights of timesteps: "denoising", and "variational"
        if sigma is learned and its weight is not 0."""
        process, config = self._process, self._config
        noisy = process.noisy(clean, noise if entering is None else entering, t)
        output = self._output(noisy, t, given)
        prediction = output[:, : clean.shape[1]]
        target = process.target(clean, noise, t).float()
        threshold = huber_threshold(process, t, config)
        error = prediction_error(prediction, target, config, threshold)
        parts = {"denoising": masked_mean(error, masks)}
        if output.shape[1] == 2 * clean.shape[1] and config.variational_weight:
            term = process.variational(clean, noisy, prediction, output[:, clean.shape[1] :], t)
            if term is not None:
                parts["variational"] = masked_mean(term, masks).float()
        return parts

    def _output(self, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """The model's output (B, C or 2C, H, W), float32."""
        frozen = self._frozen
        return frozen.family.predict(self.backbone, noisy.to(frozen.dtype), t, given).float()
