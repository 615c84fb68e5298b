"""Folds an un-gated modulating patch into a model's own weights and biases.

x' = x (1 + s) + b at the output x = W y + c of a layer is the layer with the weight (1 + s) W and
the bias (1 + s) c + b. Without a gate s and b are the same at all timesteps, so that a model can
hold them. The file is copied, and only these tensors are changed in the copy: rows of weights, the
scales of their blocks where a GGUF type has them, and biases.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmp_common.attach.modulation import Part, parts_of
from dmp_common.bases.base import Base, Naming
from dmp_common.bases.detect import PREFIXES, namings_of
from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.errors import PatchError, file_error, printable_path
from dmp_common.patch.patch import Patch
from dmp_common.tools.gguf_header import read_gguf_header
from dmp_common.tools.layout import Stored, stored_tensors

# Types of GGUF whose blocks begin with float16 numbers that all values of the block are multiplied
# by, and how many of these there are: the scale, and in some the minimum.
_SCALES = {"Q4_0": 1, "Q5_0": 1, "Q8_0": 1, "Q4_1": 2, "Q5_1": 2}
_FLOATS = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
}  # fmt: skip
_LISTED = 5  # places that an error names


class Folded(NamedTuple):
    """What was written.

    Args:
        layers: the number of layers whose weights were changed.
        biases: the number of biases that were changed.
        without: paths of the layers that have no bias for the shift, which was left out there.
    """

    layers: int
    biases: int
    without: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """Scale 1 + s and shift b (O,) of a layer's outputs, and the layer's tensors in the file."""

    path: str
    scale: Tensor
    shift: Tensor
    weight: Stored
    bias: Stored | None


def fold(
    patch: Patch,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    partial: bool = False,
) -> Folded:
    """Writes a copy of a model's file with a patch in its weights and biases.

    Args:
        patch: a patch of mix modulate without a gate, which acts at all timesteps.
        model: a `.safetensors` file of float32, float16 or bfloat16 weights, or a GGUF file, with
            the denoiser of the patch's base.
        out: the file to write, with the same ending.
        strength: multiplies scale and shift.
        partial: whether shifts that no bias can hold may be left out.

    Raises:
        PatchError: the patch depends on the timestep, the model is of another base, or the file
            cannot hold the patch; the message says where.
    """
    model, out = Path(model), Path(out)
    _require_foldable(patch)
    if out.suffix != model.suffix or out.resolve() == model.resolve():
        raise PatchError(
            f"expected another file than the model that ends in {model.suffix}, found {out}: "
            "choose one."
        )
    gguf = model.suffix == ".gguf"
    tensors = _gguf_tensors(model) if gguf else stored_tensors(model)
    changes = _changes(patch, model, tensors, strength)
    without = tuple(c.path for c in changes if c.bias is None and bool(c.shift.any()))
    _require_possible(model, changes, () if partial else without)
    # Written beside the target, so that a reader never sees a half-folded model.
    partly = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(model, partly)
        with partly.open("r+b") as file:
            for change in changes:
                _fold_weight(file, change)
                if change.bias is not None:
                    _edit(file, change.bias, change.scale, change.shift)
        os.replace(partly, out)
    except BaseException:
        partly.unlink(missing_ok=True)
        raise
    return Folded(len(changes), sum(c.bias is not None for c in changes), without)


def _require_foldable(patch: Patch) -> None:
    variant = patch.variant
    if variant.mix != "modulate" or variant.gate != "none":
        raise PatchError(
            f"expected a patch of mix modulate without a gate to fold, found mix {variant.mix} and "
            f"gate {variant.gate}: what it does depends on the timestep, or on the place, and a "
            "weight does not; train with --mix modulate --gate none."
        )
    if variant.timesteps != EVERYWHERE or variant.guidance is not None:
        raise PatchError(
            "expected a patch that acts at all timesteps and on all items to fold, found one of "
            "a part of them: attach it instead."
        )


def _gguf_tensors(path: Path) -> dict[str, Stored]:
    return {
        name: Stored(tensor.shape, tensor.kind.name, tensor.start, tensor.size)
        for name, tensor in read_gguf_header(path).items()
    }


def _changes(
    patch: Patch, path: Path, tensors: Mapping[str, Stored], strength: float
) -> list[_Change]:
    """Returns what is to be changed, for each layer of the file that holds sites."""
    prefix, naming = _names(patch.base, patch, tensors, path)
    prompts = {
        name: tensor.detach().double().sum(0) * strength  # (2, D)
        for name, tensor in patch.tensors().items()
        if name.startswith("prompts.")
    }
    changes = []
    for module, parts in parts_of(patch.sites.values(), naming).items():
        weight = tensors[f"{prefix}{module}.weight"]
        bias = tensors.get(f"{prefix}{module}.bias")
        rows = weight.shape[0]
        scale, shift = torch.ones(rows).double(), torch.zeros(rows).double()
        for part in parts:
            own = slice(part.start, part.start + patch.sites[part.site].width)
            scale[own] += prompts[f"prompts.{part.site}"][0]
            shift[own] = prompts[f"prompts.{part.site}"][1]
        changes.append(_Change(module, scale, shift, weight, bias))
    return changes


def _names(
    base: Base, patch: Patch, tensors: Mapping[str, Stored], path: Path
) -> tuple[str, Naming]:
    """Returns the prefix and the naming in which a file has the layers of all sites."""
    for naming in namings_of(base):
        modules = parts_of(patch.sites.values(), naming)
        for prefix in PREFIXES:
            names = {module: f"{prefix}{module}.weight" for module in modules}
            if all(
                name in tensors and _holds(patch, tensors[name], modules[module])
                for module, name in names.items()
            ):
                return prefix, naming
    raise file_error(
        path,
        f"the layers of a model of base {base.name}",
        f"{len(tensors)} tensors without them",
        "choose the denoiser's file of the patch's base",
    )


def _holds(patch: Patch, weight: Stored, parts: Iterable[Part]) -> bool:
    ends = [part.start + patch.sites[part.site].width for part in parts]
    return len(weight.shape) >= 2 and weight.shape[0] >= max(ends)


def _require_possible(path: Path, changes: list[_Change], without: tuple[str, ...]) -> None:
    """Refuses a file that cannot hold the patch, with all reasons in one message."""
    stuck = {
        c.weight.kind: c.path
        for c in changes
        if c.weight.kind not in _FLOATS and not _by_rows(c.weight)
    }
    stuck |= {c.bias.kind: c.path for c in changes if c.bias and c.bias.kind not in _FLOATS}
    problems = []
    if stuck:
        listed = ", ".join(f"{kind} ({place})" for kind, place in list(stuck.items())[:_LISTED])
        problems.append(
            f"expected weights as {', '.join([*_FLOATS, *_SCALES])}, whose rows can be scaled, "
            f"found {listed}: attach the patch instead"
        )
    if without:
        shown = ", ".join(without[:_LISTED]) + ", ..." * (len(without) > _LISTED)
        problems.append(
            f"expected layers with a bias for the shift, found {len(without)} without ({shown}): "
            "attach the patch instead, or leave these shifts out (--partial)"
        )
    if problems:
        raise PatchError(f"{printable_path(path)}: {'; and '.join(problems)}.")


def _fold_weight(file: Any, change: _Change) -> None:
    weight = change.weight
    if weight.kind in _FLOATS:
        _edit(file, weight, change.scale.reshape(-1, *[1] * (len(weight.shape) - 1)), None)
        return
    numbers = _SCALES[weight.kind]
    file.seek(weight.start)
    data = torch.frombuffer(bytearray(file.read(weight.size)), dtype=torch.uint8)
    blocks = data.reshape(weight.shape[0], -1, _block_bytes(weight))  # (O, blocks, bytes)
    scales = blocks[:, :, : 2 * numbers].contiguous().view(torch.float16).double()
    scaled = (scales * change.scale[:, None, None]).to(torch.float16)
    blocks[:, :, : 2 * numbers] = scaled.view(torch.uint8)
    file.seek(weight.start)
    file.write(data.numpy().tobytes())


def _by_rows(weight: Stored) -> bool:
    """Tells whether a weight has scales that belong to the values of one row."""
    whole = weight.kind in _SCALES
    return whole and weight.size % (weight.shape[0] * _block_bytes(weight)) == 0


def _block_bytes(weight: Stored) -> int:
    """Returns the bytes of one block of 32 values."""
    return weight.size * 32 // math.prod(weight.shape)


def _edit(file: Any, stored: Stored, scale: Tensor, shift: Tensor | None) -> None:
    """Multiplies the values of a tensor in an open file, and adds to them."""
    file.seek(stored.start)
    data = bytearray(file.read(stored.size))
    values = torch.frombuffer(data, dtype=_FLOATS[stored.kind]).reshape(stored.shape)
    changed = values.double() * scale
    if shift is not None:
        changed = changed + shift
    values.copy_(changed)
    file.seek(stored.start)
    file.write(bytes(data))
