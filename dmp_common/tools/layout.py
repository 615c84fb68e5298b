"""Where the tensors of a safetensors file are in it, without reading their values."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.serialize import opened, parse_json

_MAX_HEADER = 100 * 1024**2  # the format's own limit


class Stored(NamedTuple):
    """A tensor of a file.

    Args:
        shape: of the tensor.
        kind: the type of its numbers, by the name that the file format has for it.
        start, size: its place in the file, in bytes.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        PatchError: the file is damaged, or none of safetensors.
    """
    expected = "a whole safetensors file"
    with opened(path, expected) as (file, size):
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise file_error(path, expected, "another file or a part of one", "get it again")
        data = file.read(length)
    try:
        entries = parse_json(data)
        if not isinstance(entries, dict):
            raise ValueError(f"a header of {type(entries).__name__}")
        entries.pop("__metadata__", None)
        return {name: _placed(name, entry, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(path, expected, str(error), "get it again") from error


def _placed(name: str, entry: dict[str, Any], body: int, size: int) -> Stored:
    shape = entry["shape"]
    first, last = map(int, entry["data_offsets"])
    whole = isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
    if not whole or not 0 <= first <= last <= size - body:
        raise ValueError(f"a tensor {printable(name)} beyond the end of the file")
    found = Stored(tuple(shape), str(entry["dtype"]), body + first, last - first)
    if math.prod(found.shape) and found.size % math.prod(found.shape):
        raise ValueError(f"a tensor {printable(name)} of a size that is not its shape's")
    return found
