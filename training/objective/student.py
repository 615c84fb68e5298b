"""The losses of a training step: predictions of the frozen base, and the method's own losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.patch.levels import RelativeWeights
from dmp_common.patch.objectives import squared_distance
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.methods.method import Method
from training.objective.error import huber_threshold, masked_mean, prediction_error
from training.objective.noising import Process
from training.options.config import TrainConfig


class Student(nn.Module):
    """The base with what is trained: one module, so that any wrapper sees both.

    Args:
        frozen: the base, with the method on it.
        method: what is trained; None for the base alone.
        process: how data become noisy.
        config: weights of the losses.

    Attributes:
        relative: weights of timesteps that depend on what the base does there; None without.
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
        noisy: Tensor,
        t: Tensor,
        given: Given,
        target: Tensor,
        step: int,
        weights: Tensor | None = None,
        masks: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one batch; see `Aim` for the arguments.

        Args:
            step: the micro-step, which seeds the draws of the balancing losses.

        Returns:
            "loss", the weighted sum; its parts "denoising", "variational", "importance" and
            "load", where there are such; and "samples" (B,), the loss of each sample.
        """
        output = self._output(noisy, t, given)
        prediction = output[:, : target.shape[1]]
        scale = self._process.weights(t)
        if self.relative is not None:
            scale = scale * self.relative(t)
        if weights is not None:
            scale = scale * weights
        threshold = huber_threshold(self._process, t, self._config)
        error = prediction_error(prediction, target, self._config, threshold)
        losses = {"samples": scale * masked_mean(error, masks)}
        losses["denoising"] = losses["samples"].mean()
        term = None if clean is None else self._variational(clean, noisy, output, t)
        if term is not None:
            term = masked_mean(term, masks).float()
            losses["variational"] = (term if weights is None else term * weights).mean()
        if self.method is not None:
            losses |= self.method.own_losses(given, step)
        return {"loss": self._weighted_sum(losses), **losses}

    def squared_error(
        self,
        noisy: Tensor,
        t: Tensor,
        given: Given,
        target: Tensor,
        masks: Tensor | None = None,
    ) -> Tensor:
        """The squared error (B,) of each sample, unweighted: the measure of held-out images.

        It is the same for every --loss_type, so that runs with different ones can be compared.
        """
        prediction = self.prediction(noisy, t, given, target.shape[1])
        return squared_distance(prediction, target, masks)

    def prediction(self, noisy: Tensor, t: Tensor, given: Given, channels: int) -> Tensor:
        """The prediction (B, channels, H, W), float32, without a learned variance."""
        return self._output(noisy, t, given)[:, :channels]

    def _variational(
        self, clean: Tensor, noisy: Tensor, output: Tensor, t: Tensor
    ) -> Tensor | None:
        """The variational term (B, C, H, W), if sigma is learned and its weight is not 0."""
        channels = clean.shape[1]
        if output.shape[1] != 2 * channels or not self._config.variational_weight:
            return None
        prediction, sigma = output[:, :channels], output[:, channels:]
        return self._process.variational(clean, noisy, prediction, sigma, t)

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

    def _output(self, noisy: Tensor, t: Tensor, given: Given) -> Tensor:
        """The model's output (B, C or 2C, H, W), float32."""
        frozen = self._frozen
        return frozen.family.predict(self.backbone, noisy.to(frozen.dtype), t, given).float()
