"""What a patch is trained for: denoising with the frozen base, and a balanced gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dmp_common import Patch, attach, importance_loss, load_loss
from dmp_common.balancing import GateNoise, stratified_timesteps
from dmp_common.gating import kept_prompts
from dmp_common.timesteps import embed_timesteps
from training.config import TrainConfig
from training.frozen import FrozenBase


def prediction_target(scheduler: Any, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the model is to predict for clean images and noise (B, C, H, W) at timesteps t (B,).

    Raises:
        ValueError: the scheduler's prediction type is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(images, noise, t)
    if kind == "sample":
        return images
    raise ValueError(
        f"expected prediction type epsilon, v_prediction or sample, found {kind!r} in the "
        "scheduler's config"
    )


class Student(nn.Module):
    """The frozen base with the patch attached: one module, so that any wrapper sees both.

    Args:
        frozen: the base.
        patch: attached for as long as the student lives.
        config: weights of the losses, label dropout.
    """

    def __init__(self, frozen: FrozenBase, patch: Patch, config: TrainConfig) -> None:
        super().__init__()
        self.backbone = frozen.model
        self.patch = patch
        self.noise = (
            GateNoise(frozen.base.embedding, patch.variant.count) if config.load_weight else None
        )
        self._frozen = frozen
        self._config = config
        self.attachment = attach(frozen.model, patch)

    def train(self, mode: bool = True) -> Student:
        """Training mode of the patch alone: in its own, the backbone would drop labels."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self, clean: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            clean: (B, C, H, W).
            labels: (B,) class ids; some are replaced by "no class".
            generator: of all random draws, on the CPU.

        Returns:
            "loss", the weighted sum, and its parts "denoising", "importance", "load".
        """
        frozen, count = self._frozen, len(labels)
        steps = frozen.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (count,), generator=generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        dropped = torch.rand(count, generator=generator) < self._config.caption_dropout_rate
        labels = labels.masked_fill(dropped.to(labels.device), frozen.null_label)
        noisy = frozen.scheduler.add_noise(clean, noise, t)
        prediction = self.backbone(noisy, timestep=t, class_labels=labels).sample
        target = prediction_target(frozen.scheduler, clean, noise, t)
        losses = {"denoising": F.mse_loss(prediction[:, : clean.shape[1]].float(), target.float())}
        losses |= self._balancing(labels, generator)
        weights = {"importance": self._config.importance_weight, "load": self._config.load_weight}
        losses["loss"] = sum(
            (weights.get(name, 1.0) * loss for name, loss in losses.items()), torch.zeros(())
        )
        return losses

    def _balancing(self, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Both balancing losses on timesteps over the whole schedule, not on the batch's."""
        config, frozen = self._config, self._frozen
        if self.patch.variant.gate == "none" or not (
            config.importance_weight or config.load_weight
        ):
            return {}
        t = stratified_timesteps(config.balancing_timesteps, generator=generator)
        with torch.no_grad():
            chosen = labels[torch.arange(len(t)) % len(labels)]
            given = chosen if self.patch.variant.condition == "t+y" else None
            e = embed_timesteps(self.backbone, frozen.base, frozen.naming, t, given)
        losses = {}
        if config.importance_weight:
            losses["importance"] = importance_loss(self.patch.gate_weights(e))
        if self.noise is not None:
            k = kept_prompts(self.patch.variant.count)
            losses["load"] = load_loss(self.patch.gate_logits(e), self.noise(e), k, generator)
        return losses


def parameter_groups(student: Student, config: TrainConfig) -> list[dict[str, object]]:
    """Parameters for the optimiser: the prompts, and the gate with its own learning rate."""
    gate = list(student.patch.gate.parameters())
    if student.noise is not None:
        gate += list(student.noise.parameters())
    groups = [
        {"params": list(student.patch.pools.parameters()), "lr": config.learning_rate},
        {"params": gate, "lr": config.learning_rate * config.gate_lr_factor},
    ]
    return [group for group in groups if group["params"]]
