"""What is trained for: denoising with the frozen base, and a balanced gate."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import importance_loss, load_loss
from dmp_common.bases.timesteps import embed_timesteps
from dmp_common.patch.balancing import stratified_timesteps
from dmp_common.patch.gate import kept_prompts
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.methods.methods import Method, PatchMethod
from training.objective.noise import generator
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
        losses |= self._balancing(given, step)
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

    def _balancing(self, given: Given, step: int) -> dict[str, Tensor]:
        """Both balancing losses on timesteps over all that the patch has, not on the batch's."""
        config, frozen, method = self._config, self._frozen, self.method
        if not isinstance(method, PatchMethod) or method.patch.variant.gate == "none":
            return {}
        if not (config.importance_weight or config.load_weight):
            return {}
        patch = method.patch
        # Not of the rank: every process sees the same, so that its gradient is that of one.
        source = generator(config.seed, "balancing", step)
        low, high = patch.variant.timesteps
        t = stratified_timesteps(
            config.balancing_timesteps, high - 1.0, generator=source, first=float(low)
        )
        with torch.no_grad():
            e = embed_timesteps(
                self.backbone, frozen.base, frozen.naming, t, self._classes(given, source, len(t))
            )
        losses = {}
        if config.importance_weight:
            losses["importance"] = importance_loss(patch.gate_weights(e))
        if method.noise is not None:
            k = kept_prompts(patch.variant.outputs)
            logits = patch.gate_logits(e)
            losses["load"] = _load(logits, method.noise(e), k, source)
        return losses

    def _classes(self, given: Given, source: torch.Generator, count: int) -> Tensor | None:
        """Classes for a gate that sees them, of all there are; of pooled text the batch's."""
        assert isinstance(self.method, PatchMethod)
        if self.method.patch.variant.condition != "t+y":
            return None
        if "pooled" in given:
            return given["pooled"][torch.arange(count) % len(given["pooled"])]
        kind = self._frozen.kind
        if kind.num_classes is None:
            return torch.full((count,), int(kind.null_label or 0))
        return torch.randint(0, kind.num_classes, (count,), generator=source)


def _load(logits: Tensor, std: Tensor, k: int, source: torch.Generator) -> Tensor:
    """The load loss with noise from the CPU's generator, wherever the gate is."""
    if logits.device.type == "cpu":
        return load_loss(logits, std, k, source)
    seed = int(torch.randint(0, 2**62, (), generator=source))
    return load_loss(logits, std, k, torch.Generator(logits.device).manual_seed(seed))
