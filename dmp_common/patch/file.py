"""The patch file: one host-neutral, self-describing `.safetensors` file.

Tensors are `prompts.<site>` (K, N, D) and `gate.*`; the header holds `dmp.format_version` and
`dmp.config`, besides `modelspec.*` and whatever `ss_*` keys a trainer adds. Everything is checked
before a value is used, and values are copied out of the file.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch
from dmp_common.patch.serialize import serialize, write_atomically
from dmp_common.patch.variant import Variant

FORMAT_VERSION = "1"
HASH_DIGITS = 10

_MAX_HEADER = 4 * 1024**2  # ours are a few kilobytes, with training metadata some hundred
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_EXPORT_AGAIN = "get the file again, or export it again"


@dataclass(frozen=True)
class PatchFile:
    """The header of a patch file, checked.

    Args:
        path: of the file.
        variant: what the patch is made of.
        metadata: all header strings.
        size: of the file in bytes.
    """

    path: Path
    variant: Variant
    metadata: dict[str, str]
    size: int


def save_patch(
    patch: Patch,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a patch atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: must end in `.safetensors`; its folder is made if missing.
        metadata: header entries besides ours.
        dtype: of the stored values: float32, float16 or bfloat16.

    Returns:
        The file's hash, as hosts show it.

    Raises:
        PatchError: another ending, values that are not finite, or metadata that is not text.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise PatchError(f"expected a file name ending in .safetensors, found {path}: rename it.")
    if dtype not in _DTYPES.values():
        raise PatchError(f"expected float32, float16 or bfloat16 to save in, found {dtype}.")
    tensors = {name: t.to("cpu", dtype).contiguous() for name, t in patch.tensors().items()}
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise PatchError(
                f"expected finite values to save in {path}, found NaN or infinity in {name}: "
                "go back to the last good state; nothing was written."
            )
    header = {**patch.metadata, **_modelspec(patch, path), **(metadata or {}), **_own(patch)}
    if any(not isinstance(text, str) for pair in header.items() for text in pair):
        raise PatchError("expected metadata of text keys and text values: convert the others.")
    data = serialize(tensors, header)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def load_patch(path: str | os.PathLike[str]) -> Patch:
    """Reads and checks a patch file; the patch is float32, on the CPU, in evaluation mode.

    Raises:
        PatchError: the file is missing, damaged, not a patch, or of an unknown version or
            variant; the message names the file, what was expected, what was found, what to do.
    """
    path = Path(path)
    data = _read(path)
    file, names = _check_header(path, data, len(data))
    try:
        tensors = parse_safetensors(data)
    except SafetensorError as error:
        raise _bad(path, "expected a whole safetensors file", str(error)) from error
    with torch.device("meta"):
        patch = Patch(file.variant)
    _check_tensors(path, patch, names, tensors)
    patch.to_empty(device="cpu")
    patch.load_tensors(tensors)  # copies
    patch.metadata = file.metadata
    return patch.eval()


def read_header(path: str | os.PathLike[str]) -> PatchFile:
    """The checked header of a patch file, without reading its tensors."""
    path = Path(path)
    with _opened(path) as (file, size):
        return _check_header(path, _read_head(file), size)[0]


def file_hash(path: str | os.PathLike[str]) -> str:
    """First 10 hex digits of the file's sha256, as hosts show it."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1024**2):
            digest.update(block)
    return digest.hexdigest()[:HASH_DIGITS]


def _own(patch: Patch) -> dict[str, str]:
    return {
        "format": "pt",  # what tools expect of torch tensors
        "dmp.format_version": FORMAT_VERSION,
        "dmp.config": json.dumps(patch.variant.to_json()),
    }


def _modelspec(patch: Patch, path: Path) -> dict[str, str]:
    """ModelSpec 1.0.1 entries a patch can fill by itself; a trainer's own win."""
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(patch.variant.prediction)
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{patch.base.architecture}/dmp",
        "modelspec.implementation": "diffusion-model-patching",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
    }
    return {**spec, "modelspec.prediction_type": prediction} if prediction else spec


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file for reading, and its size."""
    if path.is_dir():
        raise _bad(path, "expected a patch file", "a folder", "name the file in it")
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise _bad(path, "expected a patch file", found, "check the path") from error
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        # A path with a NUL character is no OSError.
        raise _bad(path, "expected a path", str(error), "check the path") from error


def _read(path: Path) -> bytes:
    """The whole file, unless its header already says that it is not ours."""
    with _opened(path) as (file, size):
        head = _read_head(file)
        _check_header(path, head, size)
        return head + file.read()


def _read_head(file: BinaryIO) -> bytes:
    """The length of the header and the header, as far as it can be ours."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    return start + file.read(min(length, _MAX_HEADER + 1))


def _check_header(path: Path, data: bytes, size: int) -> tuple[PatchFile, dict[str, Any]]:
    """The header and the entries of the tensors, from at least the first part of a file."""
    entries = _parse_header(path, data, size)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "expected text entries in the header", "others", _EXPORT_AGAIN)
    version = metadata.get("dmp.format_version")
    if version is None:
        raise _bad(path, "expected a DMP patch", _other_file(entries, metadata), "choose a patch")
    if version != FORMAT_VERSION:
        raise _bad(
            path,
            f"expected format version {FORMAT_VERSION}",
            f"version {version[:20]!r}",
            "update this software",
        )
    try:
        config = json.loads(metadata.get("dmp.config", ""))
    except (ValueError, RecursionError) as error:
        raise _bad(path, "expected dmp.config to be JSON", str(error)) from error
    if not isinstance(config, dict):
        raise _bad(path, "expected dmp.config to be a JSON object", type(config).__name__)
    try:
        variant = Variant.from_json(config)
    except PatchError as error:
        raise PatchError(f"{path}: {error}") from error
    return PatchFile(path, variant, metadata, size), entries


def _parse_header(path: Path, data: bytes, size: int) -> dict[str, Any]:
    wanted = "expected a safetensors file"
    if len(data) < 8:
        raise _bad(path, wanted, f"{size} bytes in all")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MAX_HEADER, size - 8):
        # Only here: the length of a good header may begin with the same bytes.
        if data[:2] in _PICKLES:
            raise _bad(path, wanted, "a pickle file with another ending", "convert it first")
        raise _bad(
            path,
            f"expected a header of at most {min(_MAX_HEADER, size - 8)} bytes",
            f"one that claims {length}",
            "it is truncated or no safetensors file; " + _EXPORT_AGAIN,
        )
    try:
        entries = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, "expected a header in JSON", str(error)) from error
    if not isinstance(entries, dict):
        raise _bad(path, "expected a header of entries", type(entries).__name__)
    return entries


def _check_tensors(
    path: Path, patch: Patch, entries: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Names, shapes, types and values against what the configuration promises."""
    expected = {name: tuple(parameter.shape) for name, parameter in patch.saved().items()}
    for kind, names in (
        ("without", sorted(set(expected) - set(tensors))),
        ("with", sorted(set(tensors) - set(expected))),
    ):
        if names:
            listed = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise _bad(path, f"expected {len(expected)} tensors", f"a file {kind} {listed[:300]}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            found = f"{tuple(tensors[name].shape)}"
            raise _bad(path, f"expected {name} of shape {shape}", found)
        if entries[name]["dtype"] not in _DTYPES:
            found = str(entries[name]["dtype"])
            raise _bad(path, f"expected {name} as {', '.join(_DTYPES)}", found)
        if not _finite(tensors[name]):
            raise _bad(path, f"expected finite values in {name}", "NaN or infinity")


def _other_file(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """What a safetensors file without our header probably is."""
    names = list(entries)
    if "ss_network_module" in metadata or any("lora" in name.lower() for name in names):
        return "a LoRA"
    if any(name.startswith(("model.diffusion_model.", "down_blocks.")) for name in names):
        return "a model checkpoint"
    listed = ", ".join(names[:3])[:200]
    return f"a safetensors file with {len(names)} tensors ({listed or 'none'}) and no dmp header"


def _bad(path: Path, expected: str, found: str, remedy: str = _EXPORT_AGAIN) -> PatchError:
    return PatchError(f"{path}: {expected}, found {found}: {remedy}.")


def _finite(tensor: Tensor) -> bool:
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor.float()))
