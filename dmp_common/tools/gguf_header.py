"""The header of a GGUF file, which may be damaged or hostile, before any value is read.

The reader of the package gguf builds an object for every value of the header, however many a file
claims to have. This one skips what is not asked for and bounds the rest.

Source: the format's description in ggml, docs/gguf.md; the shapes before reshaping as
city96/ComfyUI-GGUF writes them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.serialize import opened

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_HEADER = 16 * 1024**2  # bytes; those of denoisers have some hundred kilobytes
_MOST_TENSORS, _MOST_DIMENSIONS = 100_000, 8
_ALIGNMENT = 32
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of value types
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9
_SHAPE_KEY = "comfy.gguf.orig_shape."
_AGAIN = "get the file again, or choose another"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor of a GGUF file is, and what it is.

    Args:
        shape: of the tensor in the model.
        rows: the shape that it is stored in, whose last size is a multiple of the type's block.
        kind: the type of its numbers, a `gguf.GGMLQuantizationType`.
        start, size: its place in the file, in bytes.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    kind: Any
    start: int
    size: int


def require_gguf() -> Any:
    """Returns the package gguf.

    Raises:
        PatchError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise PatchError(
            "expected the package gguf for weights in a type of GGUF, found none: pip install gguf."
        ) from error
    return gguf


def read_gguf_header(path: Path) -> dict[str, GgufTensor]:
    """Returns the tensors of a GGUF file by name, without their values.

    Raises:
        PatchError: the package gguf is missing, or the file is no GGUF file or damaged.
    """
    gguf = require_gguf()
    with opened(path, "a GGUF file") as (file, size):
        data = file.read(_MAX_HEADER)
    try:
        return _parsed(_Cursor(data), size, gguf)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(path, "a whole GGUF file", error, _AGAIN) from error


class _Cursor:
    """Reads numbers and texts one after the other; a ValueError says where the bytes end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.place:
            raise ValueError(f"a header that ends after {len(self._data)} bytes or is too long")
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))
        return int(value)

    def numbers(self, kind: str, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(kind)))

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


def _parsed(cursor: _Cursor, size: int, gguf: Any) -> dict[str, GgufTensor]:
    """The tensors of a header.

    Args:
        cursor: at the begin of the file.
        size: of the file, in bytes.
        gguf: the package.
    """
    if cursor.take(4) != _MAGIC:
        raise ValueError("no GGUF at its begin")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the format")
    count, values = cursor.number("Q"), cursor.number("Q")
    if count > _MOST_TENSORS:
        raise ValueError(f"a header that claims {count} tensors")
    known: dict[str, Any] = {}
    for _ in range(values):  # the cursor ends a number that is too large
        name = cursor.text()
        value = _value(cursor, name)
        if value is not None:
            known[name] = value
    entries = {}
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        entries[name] = (cursor.numbers("Q", dimensions), cursor.number("I"), cursor.number("Q"))
    if len(entries) != count:
        raise ValueError("two tensors of one name")
    alignment = known.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise ValueError(f"an alignment of {alignment}")
    body = -(-cursor.place // alignment) * alignment
    return _placed(entries, known, body, size, gguf)


def _value(cursor: _Cursor, name: str) -> Any:
    """Reads one value of the header: the few that are needed; others are skipped as None."""
    kind = cursor.number("I")
    if kind == _STRING:
        cursor.take(cursor.number("Q"))
    elif kind == _UINT32:
        return cursor.number("I")
    elif kind == _ARRAY:
        kind, count = cursor.number("I"), cursor.number("Q")
        if kind == _STRING:
            for _ in range(count):
                cursor.take(cursor.number("Q"))
        elif kind == _INT32 and name.startswith(_SHAPE_KEY) and count <= _MOST_DIMENSIONS:
            return cursor.numbers("i", count)
        else:
            cursor.take(count * _size(kind))
    else:
        cursor.take(_size(kind))
    return None


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SIZES[kind]


def _placed(
    entries: Mapping[str, tuple[tuple[int, ...], int, int]],
    known: Mapping[str, Any],
    body: int,
    size: int,
    gguf: Any,
) -> dict[str, GgufTensor]:
    """Tensors with their types and places, which must lie in the file.

    Args:
        entries: sizes from the last dimension on, type and offset of each tensor.
        known: values of the header.
        body: where the tensors begin.
        size: of the file.
    """
    tensors, total = {}, 0
    for name, (dimensions, number, offset) in entries.items():
        kind = gguf.GGMLQuantizationType(number)  # a ValueError for an unknown one
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows = tuple(reversed(dimensions))
        shape = known.get(_SHAPE_KEY + name, rows)
        values = math.prod(rows)
        whole = min(shape, default=1) > 0 and math.prod(shape) == values
        if not values or (rows[-1] if rows else 1) % block or not whole:
            raise ValueError(
                f"a tensor {printable(name)} of shape {shape}, stored as {rows} in blocks of "
                f"{block}"
            )
        found = GgufTensor(shape, rows, kind, body + offset, values // block * block_bytes)
        total += found.size
        if found.start + found.size > size or total > size:
            raise ValueError(f"a tensor {printable(name)} beyond the end of {size} bytes")
        tensors[name] = found
    return tensors
