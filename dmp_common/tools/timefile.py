"""The time embedding e of a model for any timesteps: from a module, or from a model on disk.

From a disk only the few tensors of the time embedding are read, whatever the size of the model,
and diffusers is not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmp_common.bases.base import Base, Naming, Probe, find_module
from dmp_common.bases.detect import PREFIXES, attribute_of_shape, find_denoiser, require_base
from dmp_common.bases.strangers import find_stranger
from dmp_common.bases.timesteps import embed_timesteps, frequency_shift, time_features
from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch

# The two linear layers of a time embedding, in diffusers, LDM and Flux; SiLU is between them.
_LAYERS = (("linear_1", "linear_2"), ("0", "2"), ("in_layer", "out_layer"))
_PARTS = ("unet", "transformer")
_WEIGHTS = "diffusion_pytorch_model"


def even_timesteps(steps: int = 50) -> Tensor:
    """Evenly spaced timesteps (T,) from noise (999) to picture (0)."""
    if steps < 1:
        raise PatchError(f"expected at least one step, found {steps}: use about 50.")
    return torch.linspace(999.0, 0.0, steps)


def time_embedding_of(
    source: Any, patch: Patch, timesteps: Tensor, labels: Tensor | int | None = None
) -> Tensor:
    """The time embedding a patch's gate sees, with the base model's own weights.

    Args:
        source: a model or pipeline; or the path of a diffusers folder (a pipeline, or its unet or
            transformer) or of a single `.safetensors` checkpoint.
        patch: made for the base of this model; its frequency shift is used.
        timesteps: (T,), on the scale 0..1000.
        labels: class label(s), one or (T,), which patches with condition t+y need.

    Returns:
        e (T, E), float32, on the model's device (from a path: the CPU).

    Raises:
        PatchError: a model of another base or another frequency shift, a damaged or unsuitable
            file, or labels missing, superfluous or out of range.
    """
    timesteps = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1)
    classes = _classes(patch, labels, len(timesteps))
    with torch.no_grad():
        if isinstance(source, (str, os.PathLike)):
            return _embed_from_disk(_ModelFiles(Path(source)), patch, timesteps, classes)
        denoiser = find_denoiser(source)
        naming = require_base(denoiser, patch.base)
        found, expected = frequency_shift(denoiser, patch.base, naming), patch.variant
        if found != expected.frequency_shift:
            raise PatchError(
                f"the patch was trained with a time embedding of frequency shift "
                f"{expected.frequency_shift:g}, and the model has {found:g}: give the model the "
                "patch was trained on."
            )
        if classes is not None:
            table = find_module(denoiser, _table(patch.base, naming))
            if isinstance(table, torch.nn.Embedding):
                _require_known(classes, table.num_embeddings)
        return embed_timesteps(denoiser, patch.base, naming, timesteps, classes).float()


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model on disk; no values are read.

    Args:
        path: a `.safetensors` file, or the folder of a diffusers model or pipeline.

    Raises:
        PatchError: nothing of the kind, or damaged.
    """
    files = _ModelFiles(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    for file_path in set(files.where.values()):
        with _open(file_path) as file:
            names = [name for name, place in files.where.items() if place == file_path]
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def _classes(patch: Patch, labels: Tensor | int | None, count: int) -> Tensor | None:
    """The class labels (T,), checked against what the gate sees."""
    if patch.variant.condition == "t":
        if labels is not None:
            raise PatchError(
                "the gate of this patch sees the timestep only, and a class label was given: "
                "leave the label out."
            )
        return None
    if labels is None:
        raise PatchError(
            "the gate of this patch sees the class besides the timestep (condition t+y), and no "
            "class label was given: give one (on the command line --label)."
        )
    classes = torch.as_tensor(labels, dtype=torch.long).reshape(-1)
    if len(classes) not in (1, count):
        raise PatchError(
            f"expected one class label or {count}, as many as timesteps, found {len(classes)}: "
            "give one."
        )
    return classes.expand(count)


def _table(base: Base, naming: Naming) -> str:
    """Path of the table of class embeddings."""
    path = base.times[naming].labels
    return f"{path}.embedding_table"


def _require_known(classes: Tensor, count: int) -> None:
    for label in set(classes.tolist()):
        if not 0 <= label < count:
            raise PatchError(
                f"expected a class label from 0 to {count - 1}, found {label}: give one that the "
                "model knows."
            )


def _embed_from_disk(
    files: _ModelFiles, patch: Patch, timesteps: Tensor, classes: Tensor | None
) -> Tensor:
    base = patch.base
    candidates = _find_layers(files, base)
    naming, prefix, names = next(
        (
            (naming, prefix, names)
            for naming, prefix, names in candidates
            if all(files.probe(prefix, probe) == probe.value for probe in base.probes[naming])
        ),
        candidates[0],
    )
    stranger = find_stranger(lambda probe: files.probe(prefix, probe) == probe.value)
    if stranger is not None:
        raise PatchError(
            f"{files.path}: expected a model of base {base.name}, found {stranger.name}, which is "
            f"not supported: give a {base.name} model."
        )
    for probe in base.probes[naming]:
        found = files.probe(prefix, probe)
        if found != probe.value:
            what = f"{probe.path}.{probe.attribute}" if probe.attribute else f"a {probe.path}"
            raise PatchError(
                f"{files.path}: expected a model of base {base.name} with {what} = {probe.value}, "
                f"found {found}: give the model this patch was made for."
            )
    first, second = (files.linear(prefix + name, base.time_bias) for name in names)
    features = time_features(timesteps, base, patch.variant.frequency_shift)
    hidden = base.embedding if base.time_hidden is None else base.time_hidden
    shapes = (hidden, base.sinusoid), (base.embedding, hidden)
    for name, (weight, bias), shape in zip(names, (first, second), shapes, strict=True):
        if tuple(weight.shape) != shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            raise PatchError(
                f"{files.path}: expected {name}.weight of shape {shape}, found "
                f"{tuple(weight.shape)}: give a {base.name} model, or a patch for this one."
            )
    e = F.linear(F.silu(F.linear(features, *first)), *second)
    if classes is None:
        return e
    rows = files.read(f"{prefix}{_table(base, naming)}.weight")
    _require_known(classes, len(rows))
    return e + rows[classes]


def _find_layers(files: _ModelFiles, base: Base) -> list[tuple[Naming, str, tuple[str, str]]]:
    """The namings and prefixes a model's tensors may have, and the names of its time layers."""
    found: list[tuple[Naming, str, tuple[str, str]]] = []
    for prefix in PREFIXES:
        for naming in base.times:
            for layers in _LAYERS:
                first, second = (f"{base.times[naming].mlp}.{layer}" for layer in layers)
                if all(f"{prefix}{name}.weight" in files.where for name in (first, second)):
                    found.append((naming, prefix, (first, second)))
    if found:
        return found
    listed = ", ".join(list(files.where)[:3])[:200] or "none"
    raise PatchError(
        f"{files.path}: expected the time embedding of base {base.name} (as "
        f"{' or '.join(dict.fromkeys(source.mlp for source in base.times.values()))}), found "
        f"{len(files.where)} other tensors ({listed}): give the model this patch was made for."
    )


class _ModelFiles:
    """The tensors of a model on disk by name, read one by one.

    Args:
        path: a `.safetensors` file, a folder with one (or with several and their index), or the
            folder of a pipeline.

    Raises:
        PatchError: nothing of the kind, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where: dict[str, Path] = {}
        if path.is_dir():
            parts = [path / part for part in _PARTS if (path / part).is_dir()]
            path = _weights_in(parts[0] if parts else path)
        elif not path.exists():
            raise _bad(path, "a model", "nothing", "check the path")
        if path.suffix == ".json":
            self.where = dict(_read_index(path))
        elif path.suffix in (".safetensors", ".sft"):
            with _open(path) as file:
                self.where = dict.fromkeys(file.keys(), path)
        else:
            remedy = "convert it, or choose the model's .safetensors file"
            raise _bad(path, "a .safetensors file or a diffusers folder", "neither", remedy)

    def read(self, name: str) -> Tensor:
        """One tensor, float32, copied out of its file."""
        path = self._of(name)
        with _open(path) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
                return tensor.to(torch.float32, copy=True)
            except SafetensorError as error:
                raise _bad(path, f"a tensor {name}", str(error)) from error

    def linear(self, name: str, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear layer; None for the bias of one that has none."""
        return self.read(f"{name}.weight"), self.read(f"{name}.bias") if bias else None

    def probe(self, prefix: str, probe: Probe) -> object:
        """What a probe finds, told from names and shapes alone."""
        path = prefix + probe.path
        if probe.attribute is None:
            return any(name.startswith(path + ".") for name in self.where)
        if f"{path}.weight" not in self.where:
            return None
        with _open(self._of(f"{path}.weight")) as file:
            shape = tuple(file.get_slice(f"{path}.weight").get_shape())
        return attribute_of_shape(probe.attribute, shape)

    def _of(self, name: str) -> Path:
        if name not in self.where:
            raise _bad(self.path, f"a tensor {name}", f"{len(self.where)} others")
        return self.where[name]


def _weights_in(folder: Path) -> Path:
    """The weights file of a diffusers model folder, or the index of several."""
    plain = folder / f"{_WEIGHTS}.safetensors"
    files = sorted(p for p in folder.glob(f"{_WEIGHTS}*.safetensors") if "-of-" not in p.name)
    for found in (
        [plain] if plain.exists() else [],
        sorted(folder.glob("*.safetensors.index*.json")),
        files,
    ):
        if found:
            return found[0]
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"
    remedy = "give a pipeline's folder, its unet or transformer, or a .safetensors file"
    raise _bad(folder, f"a folder with {_WEIGHTS}.safetensors", names, remedy)


def _read_index(path: Path) -> Iterator[tuple[str, Path]]:
    """Tensor names and the files that hold them."""
    try:
        names = json.loads(path.read_text("utf-8"))["weight_map"]
        for name, file in names.items():
            yield name, path.parent / file
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(path, "an index of model files", repr(error)) from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _bad(path, "a whole safetensors file", str(error)) from error


def _bad(path: Path, expected: str, found: str, remedy: str = "get the model again") -> PatchError:
    return PatchError(f"{path}: expected {expected}, found {found}: {remedy}.")
