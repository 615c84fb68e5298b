"""The patch file: one host-neutral, self-describing `.safetensors` file.

Tensors are `prompts.<site>` (K, N, D) and `gate.*`; the header holds `dmp.format_version` and
`dmp.config`, besides `modelspec.*` and the `ss_*` keys that a trainer adds. Everything is checked
before a value is used, and values are copied out of the file.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from dmp_common.errors import PatchError
from dmp_common.patch.header import PatchFile, bad, check_header, read_head
from dmp_common.patch.serialize import opened, serialize, write_atomically
from dmp_common.patch.variant import Variant

HASH_DIGITS = 10
LARGEST = 65504.0  # the largest value that a file may hold, and the largest float16 number

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PatchContents(NamedTuple):
    """The contents of a patch file.

    Args:
        variant: the configuration of the patch.
        tensors: the tensors by name, as they are stored, with the order and the shapes of
            `variant.shapes()`.
        metadata: all strings of the header.
    """

    variant: Variant
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_patch_file(
    path: str | os.PathLike[str],
    variant: Variant,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a patch atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: the file, which must end in `.safetensors`; a missing folder is made.
        variant: the configuration of the patch.
        tensors: the tensors by name, with the shapes of `variant.shapes()`.
        metadata: header entries besides ours.
        dtype: the type of the stored values: float32, float16 or bfloat16.

    Returns:
        The file's hash, as hosts show it.

    Raises:
        PatchError: the path has another ending, the tensors are not those of the variant, a value
            is not finite in half precision, or metadata is not text.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise PatchError(f"expected a file name ending in .safetensors, found {path}: rename it.")
    if dtype not in _DTYPES.values():
        raise PatchError(f"expected float32, float16 or bfloat16 to save in, found {dtype}.")
    shapes = variant.shapes()
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes:
        wrong = sorted(n for n in {*shapes, *given} if shapes.get(n) != given.get(n))[:3]
        raise PatchError(
            f"expected the tensors of this variant to save in {path}, found others: "
            + ", ".join(f"{n} {given.get(n, 'missing')}" for n in wrong)
            + "; give those of a patch of the same variant."
        )
    stored = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in shapes}
    wrong_value = _wrong_value(variant, stored)
    if wrong_value:
        raise PatchError(
            f"expected {_VALUES} to save in {path}, found {wrong_value}: go back to the last good "
            "state; nothing was written."
        )
    header = {**modelspec(variant, path), **(metadata or {}), **_own(variant)}
    if any(not isinstance(text, str) for pair in header.items() for text in pair):
        raise PatchError("expected metadata of text keys and text values: convert the others.")
    data = serialize(stored, header)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def read_patch_file(path: str | os.PathLike[str]) -> PatchContents:
    """Reads and checks a patch file.

    Memory in use is at most a small multiple of the file's size, whatever its header claims.

    Raises:
        PatchError: the file is missing, damaged, not a patch, or of an unknown version or
            variant; the message says which file, what was expected, what was found and what to do.
    """
    path = Path(path)
    with opened(path, "a patch file") as (file, size):
        head = read_head(file)
        header = check_header(path, head, size)
        data = head + file.read(size - len(head))
    try:
        tensors = parse_safetensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise bad(path, "a whole safetensors file", str(error)) from error
    for name, shape in header.variant.shapes().items():
        # JSON may hold a key twice, of which safetensors may read another one than we checked.
        tensor = tensors.get(name)
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (
            shape,
            _DTYPES[header.dtypes[name]],
        ):
            raise bad(path, f"{name} of shape {shape}", "two entries for it")
    ordered = {name: tensors[name] for name in header.dtypes}
    wrong_value = _wrong_value(header.variant, ordered)
    if wrong_value:
        raise bad(path, f"{_VALUES}", wrong_value)
    return PatchContents(header.variant, ordered, header.metadata)


def read_header(path: str | os.PathLike[str]) -> PatchFile:
    """Reads and checks the header of a patch file, but not its tensors.

    Raises:
        PatchError: as in `read_patch_file`, except for errors in the values of tensors.
    """
    path = Path(path)
    with opened(path, "a patch file") as (file, size):
        return check_header(path, read_head(file), size)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Returns the first 10 hex digits of a file's sha256, which hosts show as its hash.

    Raises:
        PatchError: the file does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    with opened(Path(path)) as (file, _):
        while block := file.read(1024**2):
            digest.update(block)
    return digest.hexdigest()[:HASH_DIGITS]


def modelspec(variant: Variant, path: Path) -> dict[str, str]:
    """Returns the ModelSpec 1.0.1 entries of a patch, before those that a trainer adds."""
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(variant.prediction)
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{variant.base_spec.architecture}/dmp",
        "modelspec.implementation": "diffusion-model-patching",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
    }
    return {**spec, "modelspec.prediction_type": prediction} if prediction else spec


def _own(variant: Variant) -> dict[str, str]:
    return {
        "format": "pt",  # what tools expect of torch tensors
        "dmp.format_version": variant.format_version,
        "dmp.config": json.dumps(variant.to_json()),
    }


_VALUES = f"finite values of at most {LARGEST:g}, which half precision can hold,"


def _wrong_value(variant: Variant, tensors: Mapping[str, Tensor]) -> str:
    """Describes what is wrong with the values, in a text that is empty if nothing is.

    A host adds the field in the precision of its model, often float16. Where weights are a softmax,
    a field is at most the largest prompt. Otherwise, with weights of at most 1, it is at most the
    sum over the grids of the absolute prompts.
    """
    sums = variant.gate == "none" or variant.selection == "hard" or variant.gate_form == "residual"
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor.float())
        largest = max(-float(low), float(high))
        if not math.isfinite(float(low)) or not math.isfinite(float(high)):
            return f"NaN or infinity in {name}"
        if largest > LARGEST:
            return f"{largest:.4g} in {name}"
        if sums and variant.grids > 1 and name.startswith("prompts."):
            total = float(tensor.float().abs().sum(0).max())
            if total > LARGEST:
                return f"{total:.4g} as the sum of the grids in {name}"
    return ""
