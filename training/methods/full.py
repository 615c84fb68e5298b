"""full and joint: every weight of the denoiser is trained, in joint with a patch on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.patch.serialize import serialize, write_atomically
from training.base.dit_folders import TEXT_FILE, TIME_FILE
from training.base.families import dit
from training.base.frozen import FrozenBase
from training.methods.method import Method
from training.methods.patch import PatchMethod
from training.options.config import TrainConfig

DIFFUSERS_SHIFT = 1.0  # downscale_freq_shift of diffusers' DiT; the original has 0


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
        """Writes a folder with the denoiser and its scheduler, in the layout of diffusers."""
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
        """The values of the patch, and all weights of the denoiser as base.*."""
        return super().trainable() | {f"base.{n}": p for n, p in self._weights().items()}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The parameter groups of the patch, and one of the weights."""
        weights = {"params": list(self._weights().values()), "lr": config.learning_rate}
        return [*super().groups(config), weights]

    # The weights are trained as well, so that switching the patch off gives no base.
    silenced, scale, at = Method.silenced, Method.scale, Method.at

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes the folder of `full` with the patch in it."""
        partial = _write_base(self.frozen, path, metadata, dtype)
        super().save(partial / self.patch_file, metadata, dtype)
        replace_folder(partial, path)

    def saved_parameters(self) -> int:
        """The number of values in the patch and in the denoiser."""
        return super().saved_parameters() + sum(p.numel() for p in self._weights().values())

    def remove(self) -> None:
        """Detaches the patch; the base stays as trained."""
        super().remove()
        self.frozen.model.requires_grad_(False)


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
    _forget_origin(folder / "config.json")
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


def _forget_origin(path: Path) -> None:
    """Takes the place that a model was loaded from out of its configuration: a local path says
    more of the machine and its user than of the model."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}
