"""What is trained: a patch, or one of the methods it is compared with, in the same loop.

Each method is a module of its own trainable values; attached to the frozen base (or, for `full`,
being it); and knows how its file is written.
"""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, PatchError, attach
from dmp_common.balancing import GateNoise
from dmp_common.patchfile import save_patch
from dmp_common.serialize import serialize, write_atomically
from training.config import TrainConfig
from training.families import dit
from training.frozen import TEXT_FILE, FrozenBase

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections


class Method(nn.Module):
    """What one method adds to a base.

    Args:
        frozen: the base; `remove` gives it back as it was (except for `full`, which is the base).
    """

    ending = ".safetensors"  # of its file; "" for a folder

    def __init__(self, frozen: FrozenBase) -> None:
        super().__init__()
        self._frozen = (frozen,)  # a tuple: its modules are not this method's

    @property
    def frozen(self) -> FrozenBase:
        """The base."""
        return self._frozen[0]

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained values by name."""

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameters for the optimiser."""
        return [{"params": list(self.trainable().values()), "lr": config.learning_rate}]

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes the file (or folder) of this method, atomically."""

    def saved_parameters(self) -> int:
        """Number of values in the file."""
        return sum(p.numel() for p in self.trainable().values())

    @abstractmethod
    def remove(self) -> None:
        """Takes the method off the base."""


class PatchMethod(Method):
    """dmp and prompt: a patch, attached for as long as the training lasts."""

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen)
        if config.network_weights is not None:
            self.patch = _load_matching(config, frozen)
        else:
            self.patch = Patch.create(frozen.base, **config.variant, **frozen.facts)
        if config.prompt_scale == "mean":
            self.patch.scale_for_learning()
        self.noise = None
        if config.load_weight and self.patch.variant.gate != "none":
            self.noise = GateNoise(frozen.base.embedding, self.patch.variant.count)
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
        save_patch(self.patch, path, metadata, dtype)

    def saved_parameters(self) -> int:
        """Without the noise, which only training needs."""
        return self.patch.saved_parameters

    def remove(self) -> None:
        """Detaches the patch."""
        self.attachment.remove()


class LoraMethod(Method):
    """peft's LoRA on the attention projections of the denoiser."""

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise PatchError(
                "expected the package peft for --method lora, found none: pip install peft."
            ) from error
        rank = config.network_dim or _equal_rank(frozen, config)
        self.config = LoraConfig(
            r=rank,
            lora_alpha=config.network_alpha or rank,
            target_modules=list(LORA_TARGETS),
            init_lora_weights=True,
        )
        inject_adapter_in_model(self.config, frozen.model)
        frozen.model.requires_grad_(False)
        self._names = [n for n, _ in frozen.model.named_parameters() if "lora_" in n]
        own = dict(frozen.model.named_parameters())
        for name in self._names:
            own[name].data = own[name].data.float()  # also on a base in half precision
            own[name].requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The LoRA's matrices, by their names in the denoiser."""
        own = dict(self.frozen.model.named_parameters())
        return {name: own[name] for name in self._names}

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """A file that `load_lora_weights` of a diffusers pipeline reads."""
        from peft.utils import get_peft_model_state_dict

        prefix = self.frozen.family.denoiser
        state = get_peft_model_state_dict(self.frozen.model)
        tensors = {
            f"{prefix}.{name}": value.detach().to("cpu", dtype).contiguous()
            for name, value in state.items()
        }
        described = {
            "r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "target_modules": sorted(LORA_TARGETS),
        }
        told = json.dumps({f"{prefix}.{k}": v for k, v in described.items()})
        header = {**metadata, "format": "pt", "lora_adapter_metadata": told}
        write_atomically(path, serialize(tensors, header))

    def remove(self) -> None:
        """Puts the original layers back."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.frozen.model
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config


class FullMethod(Method):
    """Every weight of the denoiser."""

    ending = ""

    def __init__(self, frozen: FrozenBase, config: TrainConfig) -> None:
        super().__init__(frozen)
        if isinstance(frozen.family, dit.DiT):
            dit.share_embeddings(frozen.model)
        frozen.model.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All weights, by name; a class table that is never looked up learns nothing."""
        return {n: p for n, p in self.frozen.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """A folder with the denoiser and its scheduler, in the layout of diffusers."""
        frozen = self.frozen
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
        if isinstance(frozen.family, dit.DiT) and dit.takes_text(model):
            size = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.in_features
            facts = {"size": size, "frequency_shift": frozen.facts["frequency_shift"]}
            (partial / TEXT_FILE).write_text(json.dumps(facts), encoding="utf-8")
        replace_folder(partial, path)

    def remove(self) -> None:
        """Stops the training; the base stays as trained."""
        self.frozen.model.requires_grad_(False)


METHODS = {"dmp": PatchMethod, "prompt": PatchMethod, "lora": LoraMethod, "full": FullMethod}


def replace_folder(partial: Path, path: Path) -> None:
    """Puts a finished folder in the place of an old one: a reader never sees half of it."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}


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
        differs = [
            f"{name} {value}"
            for name, value in patch.variant.to_json().items()
            if wanted.to_json().get(name) != value
        ]
        raise PatchError(
            "expected a patch of the variant that the options ask for as --network_weights, found "
            f"one with {', '.join(differs)[:300]}: give the same options."
        )
    return patch


def _equal_rank(frozen: FrozenBase, config: TrainConfig) -> int:
    """The rank with which a LoRA has about as many parameters as the patch would have."""
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in frozen.model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS)
    )
    if per_rank == 0:
        raise PatchError(
            f"expected attention projections ({', '.join(LORA_TARGETS)}) for --method lora, found "
            f"none in {type(frozen.model).__name__}: use another method."
        )
    variant = {**config.variant, "gate": config.gate}
    with torch.device("meta"):
        size = Patch.create(frozen.base, **variant, **frozen.facts).saved_parameters
    return max(1, round(size / per_rank))
