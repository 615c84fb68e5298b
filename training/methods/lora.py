"""peft's LoRA, which patches are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, PatchError
from dmp_common.patch.serialize import serialize, write_atomically
from training.base.frozen import FrozenBase
from training.methods.lora_ranks import Handles, limit_ranks
from training.methods.method import Method
from training.options.config import TrainConfig

MIN_DIM = "ss_dmp_network_min_dim"  # entry of the header of a T-LoRA
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections


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
        self._smallest = config.network_min_dim
        self._handles: Handles = []
        self.config = LoraConfig(
            r=rank,
            lora_alpha=config.network_alpha or rank,
            target_modules=list(LORA_TARGETS),
            init_lora_weights=True,
        )
        inject_adapter_in_model(self.config, frozen.model)
        frozen.model.requires_grad_(False)
        if config.network_min_dim is not None:
            layers = lora_layers(frozen.model)
            self._handles = limit_ranks(frozen, layers, rank, config.network_min_dim)
        self._names = [n for n, _ in frozen.model.named_parameters() if "lora_" in n]
        own = dict(frozen.model.named_parameters())
        for name in self._names:
            own[name].data = own[name].data.float()  # also on a base in half precision
            own[name].requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The LoRA's matrices, by their names in the denoiser."""
        own = dict(self.frozen.model.named_parameters())
        return {name: own[name] for name in self._names}

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Switches the LoRA off for as long as the context lasts."""
        layers = lora_layers(self.frozen.model)
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def at(self, strengths: Tensor | None) -> AbstractContextManager[object]:
        """See `Method.at`: a LoRA has one strength for all items."""
        if strengths is None or not bool((strengths == strengths[0]).all()):
            return super().at(strengths)
        return _at(lora_layers(self.frozen.model), float(strengths[0]))

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiplies the second matrix of every layer."""
        for name, matrix in self.trainable().items():
            if "lora_B" in name:
                matrix.mul_(factor)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Writes a file that `load_lora_weights` of a diffusers pipeline reads."""
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
            # diffusers before 0.36 looks for these, too.
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        told = json.dumps({f"{prefix}.{k}": v for k, v in described.items()})
        header = {**metadata, "format": "pt", "lora_adapter_metadata": told}
        if self._smallest is not None:
            header[MIN_DIM] = str(self._smallest)
        write_atomically(path, serialize(tensors, header))

    def remove(self) -> None:
        """Puts the original layers back."""
        for handle in self._handles:
            handle.remove()
        remove_lora(self.frozen.model)


def remove_lora(model: nn.Module) -> None:
    """Puts the original layers back in the place of peft's."""
    for name, layer in _named_layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def _at(layers: list[Any], strength: float) -> Iterator[None]:
    """Multiplies the scaling of peft's layers for as long as the context lasts."""
    kept = [dict(layer.scaling) for layer in layers]
    for layer, scaling in zip(layers, kept, strict=True):
        layer.scaling.update({name: strength * value for name, value in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


def lora_layers(model: nn.Module) -> list[Any]:
    """Returns peft's layers in a model."""
    return [layer for _, layer in _named_layers(model)]


def _named_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


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
