"""dmp and prompt: a patch is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, Patch, PatchError, attach, importance_loss, load_loss
from dmp_common.attach.attachment import Attachment
from dmp_common.bases.timesteps import embed_timesteps
from dmp_common.patch.balancing import GateNoise, stratified_timesteps
from dmp_common.patch.gate import kept_prompts
from training.base.frozen import FrozenBase
from training.data.draws import generator
from training.methods.gate_noise import NoisyGate
from training.methods.method import Method
from training.options.config import TrainConfig


class PatchMethod(Method):
    """dmp and prompt: a patch, attached for as long as the training lasts."""

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen)
        if config.network_weights is not None:
            self.patch = _load_matching(config, frozen)
        else:
            self.patch = Patch.create(frozen.base, **config.variant, **frozen.facts)
            if self.patch.variant.gate_init == "stages":
                self.patch.gate.begin_with_stages(_even_embedding(frozen))
        if config.prompt_scale == "mean":
            self.patch.scale_for_learning()
        self.config = config
        self.noise = None
        gated = self.patch.variant.gate != "none"
        if gated and (config.load_weight or config.gate_noise):
            self.noise = GateNoise(frozen.base.embedding, self.patch.variant.outputs)
        if self.noise is not None and config.gate_noise:
            self.patch.gate = NoisyGate(self.patch, self.noise)
        self.attachment = attach(frozen.model, self.patch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Prompts, gate, and the size of the noise of the load loss and of a noisy gate."""
        return dict(self.named_parameters())

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The prompts, and the gate with its own learning rate."""
        gate = list(self.patch.gate.parameters())
        if self.noise is not None:
            gate += list(self.noise.parameters())
        groups = [
            {"params": list(self.patch.pools.parameters()), "lr": config.learning_rate},
            {"params": gate, "lr": config.learning_rate * config.gate_lr_factor},
        ]
        return [group for group in groups if group["params"]]

    @property
    def changes_nothing(self) -> bool:
        """Whether every prompt is zero; prepended ones count even then."""
        zero = not any(bool(pool.any()) for pool in self.patch.pools.parameters())
        return zero and self.patch.variant.mix != "prepend"

    def draw(self, names: Sequence[tuple[object, ...]]) -> None:
        """Draws the noise of the gate, where there is one."""
        if isinstance(self.patch.gate, NoisyGate):
            self.patch.gate.draw(names)

    def own_losses(self, given: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Both balancing losses on timesteps over all that the patch has, not on the batch's.

        Returns:
            "importance" and "load", each where it has a weight.
        """
        config, frozen, variant = self.config, self.frozen, self.patch.variant
        if variant.gate == "none" or not (config.importance_weight or config.load_weight):
            return {}
        # Not of the rank: every process sees the same, so that its gradient is that of one.
        source = generator(config.seed, "balancing", step)
        low, high = variant.timesteps
        t = stratified_timesteps(
            config.balancing_timesteps, high - 1.0, generator=source, first=float(low)
        )
        with torch.no_grad():
            classes = self._classes(given, source, len(t))
            e = embed_timesteps(frozen.model, frozen.base, frozen.naming, t, classes)
        losses = {}
        gate = self.patch.gate
        with gate.quiet() if isinstance(gate, NoisyGate) else nullcontext():
            if config.importance_weight:
                losses["importance"] = importance_loss(self.patch.gate_weights(e))
            if config.load_weight and self.noise is not None:
                logits = self.patch.gate_logits(e)
                losses["load"] = _load(logits, self.noise(e), kept_prompts(variant.outputs), source)
        return losses

    def _classes(
        self, given: Mapping[str, Tensor], source: torch.Generator, count: int
    ) -> Tensor | None:
        """Classes for a gate that sees them: drawn from all classes, or the batch's pooled text."""
        if self.patch.variant.condition != "t+y":
            return None
        if "pooled" in given:
            return given["pooled"][torch.arange(count) % len(given["pooled"])]
        kind = self.frozen.kind
        if kind.num_classes is None:
            return torch.full((count,), int(kind.null_label or 0))
        return torch.randint(0, kind.num_classes, (count,), generator=source)

    def silenced(self) -> AbstractContextManager[object]:
        """Switches the patch off for as long as the context lasts."""
        return _switched_off(self.attachment)

    def at(self, strengths: Tensor | None) -> AbstractContextManager[object]:
        """See `Method.at`: the patch acts on each item with its strength."""
        return nullcontext() if strengths is None else _at(self.attachment, strengths)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies the prompts."""
        for prompts in self.patch.pools.parameters():
            prompts.mul_(factor)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes the patch file."""
        self.patch.save(path, metadata, dtype)

    def saved_parameters(self) -> int:
        """The number of values in the file, which lacks the noise that only training needs."""
        return self.patch.saved_parameters

    def remove(self) -> None:
        """Detaches the patch."""
        self.attachment.remove()


@contextmanager
def _switched_off(attachment: Attachment) -> Iterator[None]:
    attachment.enabled = False
    try:
        yield
    finally:
        attachment.enabled = True


@contextmanager
def _at(attachment: Attachment, strengths: Tensor) -> Iterator[None]:
    attachment.item_strengths = strengths
    try:
        yield
    finally:
        attachment.item_strengths = None


@torch.no_grad()
def _even_embedding(frozen: FrozenBase) -> Tensor:
    """Time embedding (T, E) at timesteps spread evenly over the schedule."""
    t = torch.linspace(0, 999, max(1000, 2 * frozen.base.embedding))
    return embed_timesteps(frozen.model, frozen.base, frozen.naming, t)


def starting_patch(config: TrainConfig, base: Base) -> Patch:
    """Reads the patch of --network_weights.

    Raises:
        PatchError: there is none, or one for another base.
    """
    patch = Patch.load(str(config.network_weights))
    if patch.base != base:
        raise PatchError(
            f"expected a patch for base {base.name} as --network_weights, found one for "
            f"{patch.base.name}: choose another."
        )
    return patch


def _load_matching(config: TrainConfig, frozen: FrozenBase) -> Patch:
    """The patch that training starts from; it must be of this base and variant."""
    patch = starting_patch(config, frozen.base)
    wanted = Patch.create(frozen.base, **config.variant, **frozen.facts).variant
    if patch.variant != wanted:
        asked = wanted.described()
        differs = [
            f"{name} {value}"
            for name, value in patch.variant.described().items()
            if asked[name] != value
        ]
        raise PatchError(
            "expected a patch of the variant that the options ask for as --network_weights, found "
            f"one with {', '.join(differs)[:300]}: give the same options."
        )
    return patch


def _load(logits: Tensor, std: Tensor, k: int, source: torch.Generator) -> Tensor:
    """The load loss with noise from the CPU's generator, wherever the gate is."""
    if logits.device.type == "cpu":
        return load_loss(logits, std, k, source)
    seed = int(torch.randint(0, 2**62, (), generator=source))
    return load_loss(logits, std, k, torch.Generator(logits.device).manual_seed(seed))
