"""What is trained for: denoising with the frozen base, and a balanced gate."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.methods.method import Method
from training.objective.noising import Discrete, Process
from training.objective.relative import RelativeWeights
from training.objective.variational import variational_term
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
        """Training mode of what is added alone: in its own, the base would drop labels."""
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
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            clean, noise: (B, C, H, W).
            t: (B,), on the scale 0..1000.
            given: what each sample is told.
            weights: (B,) of the samples, None if all are 1.
            step: the micro-step, which seeds the draws of the balancing losses.

        Returns:
            "loss", the weighted sum; its parts "denoising", "variational", "importance" and
            "load", where there are such; and "samples" (B,), the loss of each sample.
        """
        parts = self.denoising(clean, noise, t, given)
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
        config = self._config
        factors = {
            "denoising": 1.0,
            "variational": config.variational_weight,
            "importance": config.importance_weight,
            "load": config.load_weight,
        }
        total = clean.new_zeros((), dtype=torch.float32)
        for name, factor in factors.items():
            if name in losses:
                total = total + factor * losses[name]
        return {"loss": total, **losses}

    def denoising(self, clean: Tensor, noise: Tensor, t: Tensor, given: Given) -> dict[str, Tensor]:
        """Unweighted losses (B,) of each sample: "denoising", and "variational" if sigma is
        learned and its weight is not 0."""
        process = self._process
        noisy = process.noisy(clean, noise, t)
        like = next(self.backbone.parameters())
        output = self._frozen.family.predict(self.backbone, noisy.to(like.dtype), t, given).float()
        prediction = output[:, : clean.shape[1]]
        target = process.target(clean, noise, t).float()
        parts = {"denoising": (prediction - target).square().flatten(1).mean(1)}
        learned = output.shape[1] == 2 * clean.shape[1] and isinstance(process, Discrete)
        if learned and self._config.variational_weight:
            assert isinstance(process, Discrete)
            means = process.clean_from(prediction, noisy, t)
            sigma = output[:, clean.shape[1] :]
            parts["variational"] = variational_term(
                process.posterior, clean, means, noisy, sigma, t
            )
        return parts
