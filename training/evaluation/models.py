"""The models that are compared: the base, and what was trained on it, attached for a while.

Each is a context manager around the frozen base, which is bit for bit itself again afterwards.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmp_common import Patch, PatchError, attach
from dmp_common.patch.serialize import opened, parse_json
from training.base.dit_folders import TEXT_FILE, TIME_FILE
from training.base.families.dit import DiT
from training.base.frozen import FrozenBase
from training.evaluation.spec import Spec
from training.methods.full import DIFFUSERS_SHIFT, JointMethod
from training.methods.lora import MIN_DIM, lora_layers, remove_lora
from training.methods.lora_ranks import Handles, limit_ranks

__all__ = [
    "TRAINING",
    "Compared", "FullModel", "LoraModel", "PatchModel", "PlainModel", "Spec", "base_parameters",
    "load_compared", "read_safetensors",
]  # fmt: skip

TRAINING = ("learning_rate", "ema_decay", "steps")  # what a file says of how it was trained
_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Compared(ABC):
    """A trained model.

    Args:
        spec: what the command line says of it.

    Attributes:
        metadata: header entries of its file.
        parameters: number of its values.
    """

    metadata: Mapping[str, str]
    parameters: int

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abstractmethod
    def on(self, frozen: FrozenBase) -> AbstractContextManager[FrozenBase]:
        """A context manager that puts the model on the base and gives the base to evaluate.

        Raises:
            PatchError: it was not made for this base.
        """

    @property
    def bytes_added(self) -> int:
        """The size of its file's values in half precision; of full and joint a whole model's."""
        return 2 * self.parameters

    @property
    def trained(self) -> dict[str, float | int | None]:
        """How the model was trained, as its file says; None where the file does not say it."""
        config = _json(self.metadata.get("ss_dmp_config"))
        steps = _number(self.metadata.get("ss_steps"))
        return {
            "learning_rate": _number(self.metadata.get("ss_learning_rate")),
            "ema_decay": _number(config.get("ema_decay")),
            "steps": None if steps is None else int(steps),
        }


class PatchModel(Compared):
    """dmp and prompt: a patch file."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.patch = Patch.load(spec.path)
        gated = self.patch.variant.gate != "none"
        if gated != (spec.kind == "dmp"):
            raise PatchError(
                f"expected a patch {'without' if gated else 'with'} a gate for {spec.label} of "
                f"kind {spec.kind}, found {spec.path}: its kind is {'dmp' if gated else 'prompt'}."
            )
        self.metadata, self.parameters = self.patch.metadata, self.patch.saved_parameters

    @contextmanager
    def on(self, frozen: FrozenBase) -> Iterator[FrozenBase]:
        """See `Compared.on`."""
        self.patch.to(next(frozen.model.parameters()).device)
        strength = self.spec.settings.strength
        with attach(frozen.model, self.patch, strength=1.0 if strength is None else strength):
            yield frozen


class LoraModel(Compared):
    """lora: a file in the format of diffusers, for peft's layers."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.tensors, self.metadata = read_safetensors(Path(spec.path))
        self.parameters = sum(t.numel() for t in self.tensors.values())
        told = _json(self.metadata.get("lora_adapter_metadata"))
        self.config = {name.rpartition(".")[2]: value for name, value in told.items()}
        if {"r", "lora_alpha", "target_modules"} - set(self.config):
            raise PatchError(
                f"expected a LoRA with its rank, alpha and modules in the header "
                f"(lora_adapter_metadata) at {spec.path}, found none: save it with the trainer, or "
                "with diffusers' save_lora_adapter."
            )

    @contextmanager
    def on(self, frozen: FrozenBase) -> Iterator[FrozenBase]:
        """See `Compared.on`."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        model, prefix = frozen.model, f"{frozen.family.denoiser}."
        state = {name.removeprefix(prefix): value for name, value in self.tensors.items()}
        handles: Handles = []
        config = LoraConfig(**{n: self.config[n] for n in ("r", "lora_alpha", "target_modules")})
        inject_adapter_in_model(config, model)
        try:
            wanted = {
                name.replace(".default", ""): value.shape
                for name, value in model.named_parameters()
                if "lora_" in name
            }
            if wanted != {name: value.shape for name, value in state.items()}:
                raise PatchError(
                    f"expected a LoRA for base {frozen.base.name} ({len(wanted)} matrices), found "
                    f"one with {len(state)} that do not fit at {self.spec.path}: choose another."
                )
            set_peft_model_state_dict(model, state)
            model.requires_grad_(False)
            if MIN_DIM in self.metadata:
                smallest = int(self.metadata[MIN_DIM])
                handles += limit_ranks(frozen, lora_layers(model), self.config["r"], smallest)
            yield frozen
        finally:
            for handle in handles:
                handle.remove()
            remove_lora(model)


class FullModel(Compared):
    """full: a folder with a denoiser of its own; joint: with a patch besides."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        found = sorted(Path(spec.path).glob(f"*/{_WEIGHTS}"))
        if len(found) != 1:
            raise PatchError(
                f"expected a folder with one denoiser (transformer or unet, with {_WEIGHTS}) for "
                f"{spec.label}, found {len(found)} in {spec.path}: name a folder that --method "
                "full wrote."
            )
        self.file = found[0]
        with _opened(self.file) as file:
            self.metadata = file.metadata() or {}
            sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        self.parameters = sum(torch.Size(size).numel() for size in sizes)
        self.patch: Patch | None = None
        if spec.kind == "joint":
            self.patch = Patch.load(Path(spec.path) / JointMethod.patch_file)
            self.parameters += self.patch.saved_parameters

    @contextmanager
    def on(self, frozen: FrozenBase) -> Iterator[FrozenBase]:
        """See `Compared.on`; the base itself is not touched."""
        self._require_same_times(frozen)
        model = copy.deepcopy(frozen.model)
        tensors, _ = read_safetensors(self.file)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise PatchError(
                f"expected the weights of base {frozen.base.name} in {self.file}, found others: "
                f"{' '.join(str(error).split())[:200]}: choose another folder."
            ) from error
        trained = replace(frozen, model=model)
        if self.patch is None:
            yield trained
            return
        self.patch.to(next(model.parameters()).device)
        with attach(model, self.patch):
            yield trained

    def _require_same_times(self, frozen: FrozenBase) -> None:
        """A DiT's weights mean something in the time embedding they were trained with alone."""
        if not isinstance(frozen.family, DiT):
            return
        own: float | None = DIFFUSERS_SHIFT
        for name in (TEXT_FILE, TIME_FILE):
            path = Path(self.spec.path) / name
            if path.is_file():
                told = _json(path.read_text(encoding="utf-8"))
                own = _number(told.get("frequency_shift", own))
        wanted = frozen.facts["frequency_shift"]
        if own != wanted:
            raise PatchError(
                f"expected a model with the base's frequency shift {wanted} of the time embedding, "
                f"found {own} in {self.spec.path}: evaluate it on the base it was trained from."
            )


class PlainModel(Compared):
    """base and exact: what models are put on, with nothing on it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.metadata, self.parameters = {}, 0

    def on(self, frozen: FrozenBase) -> AbstractContextManager[FrozenBase]:
        """See `Compared.on`."""
        return nullcontext(frozen)


def load_compared(spec: Spec) -> Compared:
    """Reads a model's file; a plain one has none.

    Raises:
        PatchError: there is none, or another than its kind says.
    """
    if not spec.trained:
        return PlainModel(spec)
    if spec.kind in ("dmp", "prompt"):
        return PatchModel(spec)
    return LoraModel(spec) if spec.kind == "lora" else FullModel(spec)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        PatchError: there is none, or it is damaged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with opened(path, "a safetensors file"):
            pass  # the library would wait for a pipe
        with safe_open(path, framework="pt") as file:
            yield file
    # A KeyError is a type of numbers that torch does not have.
    except (OSError, SafetensorError, KeyError) as error:
        raise PatchError(
            f"expected a safetensors file at {path}, found {str(error)[:120]}: check the path."
        ) from error


def _json(text: str | None) -> dict[str, Any]:
    """A JSON entry of a header; empty where the header has none that can be read."""
    try:
        value = parse_json(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def base_parameters(model: nn.Module) -> int:
    """The number of values of the base."""
    return sum(parameter.numel() for parameter in model.parameters())
