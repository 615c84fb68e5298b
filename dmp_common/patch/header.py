"""The header of a patch file, checked before any tensor is read.

Names, shapes and sizes of the tensors are compared with those that the configuration promises, so
that nothing is allocated for a file that promises more than it holds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dmp_common.errors import PatchError, file_error, printable, printable_path
from dmp_common.patch.serialize import parse_json
from dmp_common.patch.variant import Variant

FORMAT_VERSIONS = ("1", "2")  # which this software reads; a patch is saved in the lowest
EXPORT_AGAIN = "get the file again, or export it again"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_MAX_HEADER = 4 * 1024**2  # ours have a few kilobytes, or some hundred with training metadata
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class PatchFile:
    """The checked header of a patch file.

    Args:
        path: the file.
        variant: the configuration of the patch.
        metadata: all strings of the header.
        size: the size of the file in bytes.
        dtypes: "F32", "F16" or "BF16" for each tensor.
    """

    path: Path
    variant: Variant
    metadata: dict[str, str]
    size: int
    dtypes: dict[str, str]


def read_head(file: BinaryIO) -> bytes:
    """Reads the length of the header and the header, but not more than a patch can have."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    return start + file.read(min(length, _MAX_HEADER + 1))


def check_header(path: Path, data: bytes, size: int) -> PatchFile:
    """Parses and checks the header of a patch file, with names, shapes and types of its tensors.

    Args:
        path: the file, for error messages.
        data: the bytes that `read_head` returns, or more.
        size: the size of the file in bytes.

    Raises:
        PatchError: the file is not a patch or is damaged, or its tensors are not those of its
            configuration.
    """
    entries, body = _parse_header(path, data, size)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise bad(path, "text entries in the header", "others")
    variant = _check_config(path, entries, metadata)
    dtypes = _check_entries(path, variant.shapes(), entries, body)
    return PatchFile(path, variant, metadata, size, dtypes)


def bad(path: Path, expected: str, found: str, remedy: str = EXPORT_AGAIN) -> PatchError:
    """Makes an error about a patch file."""
    return file_error(path, expected, found, remedy)


def _parse_header(path: Path, data: bytes, size: int) -> tuple[dict[str, Any], int]:
    """Returns the entries of a safetensors header, and the number of bytes after it."""
    wanted = "a safetensors file"
    if len(data) < 8:
        raise bad(path, wanted, f"{size} bytes in all")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MAX_HEADER, size - 8):
        # This is checked only now, because the length of a good header may have the same bytes.
        if data.startswith(_PICKLES):
            raise bad(path, wanted, "a pickle file with another ending", "convert it first")
        raise bad(
            path,
            f"a header of at most {min(_MAX_HEADER, size - 8)} bytes",
            f"one that claims {length}",
            "it is truncated or no safetensors file; " + EXPORT_AGAIN,
        )
    try:
        entries = parse_json(data[8 : 8 + length])
    except ValueError as error:
        raise bad(path, "a header in JSON", str(error)) from error
    if not isinstance(entries, dict):
        raise bad(path, "a header of entries", type(entries).__name__)
    return entries, size - 8 - length


def _check_config(path: Path, entries: Mapping[str, Any], metadata: Mapping[str, str]) -> Variant:
    """Returns the variant that a header describes."""
    version = metadata.get("dmp.format_version")
    if version is None:
        raise bad(path, "a DMP patch", _other_file(entries, metadata), "choose a patch")
    if version not in FORMAT_VERSIONS:
        raise bad(
            path,
            f"format version {' or '.join(FORMAT_VERSIONS)}",
            f"version {version[:20]!r}",
            "update this software",
        )
    try:
        config = parse_json(metadata.get("dmp.config", ""))
    except ValueError as error:
        raise bad(path, "dmp.config to be JSON", str(error)) from error
    if not isinstance(config, dict):
        raise bad(path, "dmp.config to be a JSON object", type(config).__name__)
    try:
        variant = Variant.from_json(config)
    except PatchError as error:
        raise PatchError(f"{printable_path(path)}: {error}") from error
    if version < variant.format_version:
        needed = f"format version {variant.format_version} for what dmp.config says"
        raise bad(path, needed, f"version {version}")
    return variant


def _check_entries(
    path: Path, expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Any], body: int
) -> dict[str, str]:
    """Checks the names, shapes, types and places of the tensors, and returns their types.

    Args:
        path: the file, for error messages.
        expected: the shape of each tensor that the configuration promises.
        entries: the entries of the header, one for each tensor.
        body: the number of bytes after the header.
    """
    for kind, names in (
        ("without", sorted(set(expected) - set(entries))),
        ("with", sorted(set(entries) - set(expected))),
    ):
        if names:
            listed = ", ".join(printable(name, 60) for name in names[:5])
            listed += " ..." if len(names) > 5 else ""
            raise bad(path, f"{len(expected)} tensors", f"a file {kind} {listed}")
    for name, shape in expected.items():
        _check_entry(path, name, shape, entries[name])
    place = 0
    for begin, end in sorted(tuple(entries[name]["data_offsets"]) for name in expected):
        if begin != place:
            raise bad(path, "tensors side by side", f"one that begins at byte {begin}")
        place = end
    if place != body:
        raise bad(path, f"a whole safetensors file of {place} bytes of tensors", f"{body} bytes")
    return {name: entries[name]["dtype"] for name in expected}


def _check_entry(path: Path, name: str, shape: tuple[int, ...], entry: object) -> None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(path, f"dtype, shape and data_offsets of {name}", repr(entry))
    found = entry["shape"]
    if not _whole_numbers(found) or tuple(found) != shape:
        shown = tuple(found) if isinstance(found, list) else found
        raise bad(path, f"{name} of shape {shape}", str(shown))
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise bad(path, f"{name} as {', '.join(ITEM_BYTES)}", str(dtype))
    places, size = entry["data_offsets"], math.prod(shape) * ITEM_BYTES[dtype]
    if not _whole_numbers(places) or len(places) != 2 or places[1] - places[0] != size:
        raise bad(path, f"{size} bytes for {name}", f"those from and to {places!r}")


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _other_file(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """Describes what a safetensors file without our header probably is."""
    names = list(entries)
    if "ss_network_module" in metadata or any("lora" in name.lower() for name in names):
        return "a LoRA"
    if any(name.startswith(("model.diffusion_model.", "down_blocks.")) for name in names):
        return "a model checkpoint"
    listed = ", ".join(printable(name, 60) for name in names[:3]) or "none"
    return f"a safetensors file with {len(names)} tensors ({listed}) and no dmp header"
