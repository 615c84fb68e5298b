"""What is trained: a patch, or one of the methods it is compared with, in the same loop.

Each method is a module of its own trainable values; attached to the frozen base (or, for `full`,
being it); and knows how its file is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, PatchError, attach
from dmp_common.bases.timesteps import embed_timesteps
from dmp_common.patch.balancing import GateNoise
from dmp_common.patch.serialize import serialize, write_atomically
from training.base.families import dit
from training.base.frozen import TEXT_FILE, TIME_FILE, FrozenBase
from training.methods.lora import LORA_TARGETS, LoraMethod
from training.methods.method import Method
from training.options.config import TrainConfig

DIFFUSERS_SHIFT = 1.0  # downscale_freq_shift of diffusers' DiT; the original has 0


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
        self.noise = None
        if config.load_weight and self.patch.variant.gate != "none":
            self.noise = GateNoise(frozen.base.embedding, self.patch.variant.outputs)
        self.attachment = attach(frozen.model, self.patch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Prompts, gate, and the noise of the load loss."""
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

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """The patch file."""
        self.patch.save(path, metadata, dtype)

    def saved_parameters(self) -> int:
        """Without the noise, which only training needs."""
        return self.patch.saved_parameters

    def remove(self) -> None:
        """Detaches the patch."""
        self.attachment.remove()


class FullMethod(Method):
    """Every weight of the denoiser."""

    ending = ""

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen)
        _train_base(frozen)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All weights, by name; a class table that is never looked up learns nothing."""
        return {n: p for n, p in self.frozen.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """A folder with the denoiser and its scheduler, in the layout of diffusers."""
        replace_folder(_write_base(self.frozen, path, metadata, dtype), path)

    def remove(self) -> None:
        """Stops the training; the base stays as trained."""
        self.frozen.model.requires_grad_(False)


class JointMethod(PatchMethod):
    """Every weight of the denoiser and a patch on it, from scratch: nothing is frozen."""

    ending = ""
    patch_file = "patch.safetensors"  # in the folder

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen, config)
        _train_base(frozen)

    def _weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.frozen.model.named_parameters() if p.requires_grad}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the patch trains, and all weights of the denoiser as base.*."""
        return super().trainable() | {f"base.{n}": p for n, p in self._weights().items()}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The groups of the patch, and the weights."""
        weights = {"params": list(self._weights().values()), "lr": config.learning_rate}
        return [*super().groups(config), weights]

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """The folder of `full`, with the patch in it."""
        partial = _write_base(self.frozen, path, metadata, dtype)
        super().save(partial / self.patch_file, metadata, dtype)
        replace_folder(partial, path)

    def saved_parameters(self) -> int:
        """Of both."""
        return super().saved_parameters() + sum(p.numel() for p in self._weights().values())

    def remove(self) -> None:
        """Detaches the patch; the base stays as trained."""
        super().remove()
        self.frozen.model.requires_grad_(False)


METHODS: dict[str, Callable[[FrozenBase, TrainConfig], Method]] = {
    "dmp": PatchMethod,
    "prompt": PatchMethod,
    "lora": LoraMethod,
    "full": FullMethod,
    "joint": JointMethod,
}


def replace_folder(partial: Path, path: Path) -> None:
    """Puts a finished folder in the place of an old one: a reader never sees half of it."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _train_base(frozen: FrozenBase) -> None:
    """Makes every weight of the denoiser trainable."""
    if isinstance(frozen.family, dit.DiT):
        dit.share_embeddings(frozen.model)
    frozen.model.requires_grad_(True)


def _write_base(
    frozen: FrozenBase, path: Path, metadata: Mapping[str, str], dtype: torch.dtype
) -> Path:
    """Writes denoiser and scheduler into a hidden folder beside `path`, and returns it."""
    partial = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    folder = partial / frozen.family.denoiser
    folder.mkdir(parents=True)
    model: Any = frozen.model
    model.save_config(folder)
    # Copies: the blocks of a DiT share their embedding here, and do not in diffusers' files.
    tensors = {n: t.detach().to("cpu", dtype, copy=True) for n, t in _state(model).items()}
    # Held in memory twice for a moment, which fits where the optimiser of all weights did.
    data = serialize(tensors, {**metadata, "format": "pt"})
    write_atomically(folder / "diffusion_pytorch_model.safetensors", data)
    frozen.scheduler.save_pretrained(partial / "scheduler")
    if not isinstance(frozen.family, dit.DiT):
        return partial
    shift = {"frequency_shift": frozen.facts["frequency_shift"]}
    if dit.takes_text(model):
        size = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.in_features
        (partial / TEXT_FILE).write_text(json.dumps({"size": size, **shift}), encoding="utf-8")
    elif shift["frequency_shift"] != DIFFUSERS_SHIFT:
        (partial / TIME_FILE).write_text(json.dumps(shift), encoding="utf-8")
    return partial


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}


@torch.no_grad()
def _even_embedding(frozen: FrozenBase) -> Tensor:
    """Time embedding (T, E) at timesteps spread evenly over the schedule."""
    t = torch.linspace(0, 999, max(1000, 2 * frozen.base.embedding))
    return embed_timesteps(frozen.model, frozen.base, frozen.naming, t)


def _load_matching(config: TrainConfig, frozen: FrozenBase) -> Patch:
    """The patch to go on from, which must be of this base."""
    patch = Patch.load(str(config.network_weights))
    if patch.base != frozen.base:
        raise PatchError(
            f"expected a patch for base {frozen.base.name} as --network_weights, found one for "
            f"{patch.base.name}: choose another."
        )
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


__all__ = ["LORA_TARGETS", "METHODS", "Method", "PatchMethod", "replace_folder"]
