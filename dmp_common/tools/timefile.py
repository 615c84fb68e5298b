"""Computes the time embedding e of any timesteps, with a loaded model or with a model on disk.

Of a model on disk only the few tensors of the time embedding are read, whatever its size, and
diffusers is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmp_common.bases.base import Base, Naming, find_module
from dmp_common.bases.detect import PREFIXES, find_denoiser, require_base
from dmp_common.bases.strangers import find_stranger
from dmp_common.bases.timenet import TimeNet
from dmp_common.bases.timesteps import embed_timesteps, frequency_shift, time_features
from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.patch import Patch
from dmp_common.tools.modelfiles import ModelFiles

# The two linear layers of a time embedding, in diffusers, LDM and Flux; SiLU is between them.
_LAYERS = (("linear_1", "linear_2"), ("0", "2"), ("in_layer", "out_layer"))


def even_timesteps(steps: int = 50) -> Tensor:
    """Returns evenly spaced timesteps (T,) from noise (999) to picture (0)."""
    if steps < 1:
        raise PatchError(f"expected at least one step, found {steps}: use about 50.")
    return torch.linspace(999.0, 0.0, steps)


def time_embedding_of(
    source: Any, patch: Patch, timesteps: Tensor, labels: Tensor | int | None = None
) -> Tensor:
    """Computes the time embedding that a patch's gate sees, with the base model's own weights.

    Args:
        source: a model or pipeline; or the path of a diffusers folder (a pipeline, or its unet or
            transformer) or of a single `.safetensors` checkpoint.
        patch: the patch, which is for the base of this model; its frequency shift is used.
        timesteps: (T,), on the scale 0..1000.
        labels: one class label, or one for each timestep (T,), for patches with condition t+y.

    Returns:
        e (T, E), float32, on the model's device (the CPU for a path).

    Raises:
        PatchError: the model has another base or another frequency shift, a file is damaged or
            unsuitable, or labels are missing, superfluous or out of range.
    """
    timesteps = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1)
    classes = _classes(patch, labels, len(timesteps))
    with torch.no_grad():
        if isinstance(source, (str, os.PathLike)):
            return _embed_from_disk(ModelFiles(Path(source)), patch, timesteps, classes)
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


def _classes(patch: Patch, labels: Tensor | int | None, count: int) -> Tensor | None:
    """Returns the class labels (T,), or None if the gate does not see the class."""
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
    """Returns the path of the table of class embeddings."""
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
    files: ModelFiles, patch: Patch, timesteps: Tensor, classes: Tensor | None
) -> Tensor:
    base = patch.base
    naming, prefix, names = _require_model(files, base)
    features = time_features(timesteps, base, patch.variant.frequency_shift)
    if base.time_net is not None:
        mlp = prefix + base.times[naming].mlp
        return _embed_by_net(files, base, base.time_net, mlp, features)
    first, second = (files.linear(prefix + name, base.time_bias) for name in names)
    hidden = base.embedding if base.time_hidden is None else base.time_hidden
    shapes = (hidden, base.sinusoid), (base.embedding, hidden)
    for name, (weight, bias), shape in zip(names, (first, second), shapes, strict=True):
        if tuple(weight.shape) != shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            raise file_error(
                files.path,
                f"{name}.weight of shape {shape}" + (" and its bias" if base.time_bias else ""),
                " and ".join(str(tuple(part.shape)) for part in (weight, bias) if part is not None),
                f"give a {base.name} model, or a patch for this one",
            )
    e = F.linear(F.silu(F.linear(features, *first)), *second)
    if classes is None:
        return e
    table = f"{prefix}{_table(base, naming)}.weight"
    rows = files.read(table)
    if rows.dim() != 2 or rows.shape[1] != base.embedding:
        raise file_error(
            files.path,
            f"{table} of shape (classes, {base.embedding})",
            tuple(rows.shape),
            f"give a {base.name} model, or a patch for this one",
        )
    _require_known(classes, len(rows))
    return e + rows[classes]


def _require_model(files: ModelFiles, base: Base) -> tuple[Naming, str, list[str]]:
    """Returns naming, prefix and time layers of a model on disk, which must be of the base."""
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
        raise file_error(
            files.path,
            f"a model of base {base.name}",
            f"{stranger.name}, which is not supported",
            f"give a {base.name} model",
        )
    for probe in base.probes[naming]:
        found = files.probe(prefix, probe)
        if found != probe.value:
            what = f"{probe.path}.{probe.attribute}" if probe.attribute else f"a {probe.path}"
            raise file_error(
                files.path,
                f"a model of base {base.name} with {what} = {probe.value}",
                found,
                "give the model this patch was made for",
            )
    return naming, prefix, names


def _embed_by_net(
    files: ModelFiles, base: Base, net: TimeNet, mlp: str, features: Tensor
) -> Tensor:
    """Returns e (T, E) of the sinusoid (T, F), by the tensors below a path of the file."""

    def read(*names: str) -> Tensor:
        paths = [f"{mlp}.{name}" for name in names]
        return files.read(next((path for path in paths if path in files.where), paths[0]))

    expected, hint = f"the time embedding of base {base.name}", f"give a {base.name} model"
    try:
        e = net.embed(read, features, net.depth)
    except RuntimeError as error:  # its matrices do not fit each other
        raise file_error(files.path, expected, str(error).splitlines()[0], hint) from error
    if e.shape != (len(features), base.embedding):
        found = f"one of {e.shape[-1]} channels"
        raise file_error(files.path, f"{expected} of {base.embedding} channels", found, hint)
    return e


def _find_layers(files: ModelFiles, base: Base) -> list[tuple[Naming, str, list[str]]]:
    """Returns the possible namings and prefixes of a model's tensors, with its time layers."""
    found: list[tuple[Naming, str, list[str]]] = []
    known: Sequence[tuple[str, ...]] = _LAYERS
    if base.time_net is not None:
        known = [(layer,) for layer in base.time_net.layers]
    for prefix in PREFIXES:
        for naming in base.times:
            for layers in known:
                names = [f"{base.times[naming].mlp}.{layer}" for layer in layers]
                if all(f"{prefix}{name}.weight" in files.where for name in names):
                    found.append((naming, prefix, names))
    if found:
        return found
    listed = ", ".join(printable(name, 60) for name in list(files.where)[:3]) or "none"
    modules = " or ".join(dict.fromkeys(source.mlp for source in base.times.values()))
    raise file_error(
        files.path,
        f"the time embedding of base {base.name} (as {modules})",
        f"{len(files.where)} other tensors ({listed})",
        "give the model this patch was made for",
    )
