"""Hostile GGUF files, made byte by byte: each function writes a file, returns its path."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

_F32, _Q4_0 = 0, 2  # types of tensors
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9  # types of values


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(
    name: bytes, sizes: Sequence[int], offset: int = 0, kind: int = _F32, count: int | None = None
) -> bytes:
    """One entry of a header; `count` claims another number of dimensions."""
    dimensions = len(sizes) if count is None else count
    numbers = struct.pack(f"<I{len(sizes)}QIQ", dimensions, *sizes, kind, offset)
    return _text(name) + numbers


def value(name: bytes, kind: int, content: bytes) -> bytes:
    """One value of a header."""
    return _text(name) + struct.pack("<I", kind) + content


def _write(
    folder: Path, tensors: Sequence[bytes] = (), values: Sequence[bytes] = (), body: int = 256,
    claims: tuple[int, int] | None = None, version: int = 3,
) -> Path:  # fmt: skip
    """A file of these entries; `claims` are other numbers of tensors and values."""
    counts = claims or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*values, *tensors])
    path = folder / "model.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(body))
    return path


def cut(folder: Path) -> Path:
    """The first bytes of a file."""
    path = _write(folder, [tensor(b"a.weight", [4])])
    path.write_bytes(path.read_bytes()[:40])
    return path


def another_format(folder: Path) -> Path:
    """Zeros."""
    (folder / "model.gguf").write_bytes(bytes(4096))
    return folder / "model.gguf"


def another_version(folder: Path) -> Path:
    """A version of the format that does not exist."""
    return _write(folder, [tensor(b"a.weight", [4])], version=2**31)


def claimed_tensors(folder: Path) -> Path:
    """More tensors than any file can have."""
    return _write(folder, claims=(2**63, 0))


def claimed_values(folder: Path) -> Path:
    """More values than any file can have."""
    return _write(folder, claims=(0, 2**63))


def claimed_elements(folder: Path) -> Path:
    """An array of more numbers than any file can have."""
    content = struct.pack("<IQ", _INT32, 2**62)
    return _write(folder, values=[value(b"comfy.gguf.orig_shape.a", _ARRAY, content)])


def many_strings(folder: Path) -> Path:
    """An array of many empty strings, for each of which a reader could build an object."""
    content = struct.pack("<IQ", _STRING, 2**18) + bytes(8 * 2**18)
    return _write(folder, values=[value(b"tokens", _ARRAY, content)], claims=(50_000, 1))


def nested_arrays(folder: Path) -> Path:
    """An array of arrays, a hundred thousand deep."""
    content = struct.pack("<IQ", _ARRAY, 1) * 100_000
    return _write(folder, values=[value(b"deep", _ARRAY, content)])


def unknown_value(folder: Path) -> Path:
    """A value of a type that does not exist, whose length nobody knows."""
    return _write(folder, values=[value(b"odd", 77, bytes(8))])


def long_name(folder: Path) -> Path:
    """A name that claims to be longer than the file."""
    return _write(folder, [struct.pack("<Q", 2**63) + b"name"])


def broken_name(folder: Path) -> Path:
    """A name that is not UTF-8."""
    return _write(folder, [tensor(b"\xff\xfe\x1b[2J", [4])])


def many_dimensions(folder: Path) -> Path:
    """A tensor that claims four thousand million dimensions."""
    return _write(folder, [tensor(b"a.weight", [4], count=2**32 - 1)])


def vast_sizes(folder: Path) -> Path:
    """A tensor whose number of values overflows 64 bits to a small number."""
    return _write(folder, [tensor(b"a.weight", [2**33, 2**33])])


def empty_size(folder: Path) -> Path:
    """A tensor with a size of zero beside a vast one."""
    return _write(folder, [tensor(b"a.weight", [0, 2**62])])


def beyond_the_end(folder: Path) -> Path:
    """A tensor whose place overflows 64 bits."""
    return _write(folder, [tensor(b"a.weight", [4], offset=2**64 - 8)])


def one_place_for_all(folder: Path) -> Path:
    """A thousand tensors on the same bytes, which would take a thousand times the file."""
    names = [b"a.%d.weight" % n for n in range(1000)]
    return _write(folder, [tensor(name, [16_384]) for name in names], body=65_536)


def twice(folder: Path) -> Path:
    """Two tensors of one name."""
    return _write(folder, [tensor(b"a.weight", [4])] * 2)


def unknown_type(folder: Path) -> Path:
    """A tensor in a type that does not exist."""
    return _write(folder, [tensor(b"a.weight", [32], kind=9999)])


def half_a_block(folder: Path) -> Path:
    """A tensor whose rows are no whole blocks of its type."""
    return _write(folder, [tensor(b"a.weight", [16, 2], kind=_Q4_0)])


def _shaped(folder: Path, *shape: int) -> Path:
    content = struct.pack(f"<IQ{len(shape)}i", _INT32, len(shape), *shape)
    values = [value(b"comfy.gguf.orig_shape.a.weight", _ARRAY, content)]
    return _write(folder, [tensor(b"a.weight", [32, 2], kind=_Q4_0)], values)


def negative_shape(folder: Path) -> Path:
    """A shape of negative sizes whose product is right."""
    return _shaped(folder, -2, -32)


def another_shape(folder: Path) -> Path:
    """A shape of more values than there are."""
    return _shaped(folder, 64, 32)


def no_alignment(folder: Path) -> Path:
    """Tensors that begin at a multiple of zero."""
    values = [value(b"general.alignment", _UINT32, struct.pack("<I", 0))]
    return _write(folder, [tensor(b"a.weight", [4])], values)


def pipe(folder: Path) -> Path:
    """A pipe that nobody writes to."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "model.gguf")
    return folder / "model.gguf"


GGUFS: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        cut,
        another_format,
        another_version,
        claimed_tensors,
        claimed_values,
        claimed_elements,
        many_strings,
        nested_arrays,
        unknown_value,
        long_name,
        broken_name,
        many_dimensions,
        vast_sizes,
        empty_size,
        beyond_the_end,
        one_place_for_all,
        twice,
        unknown_type,
        half_a_block,
        negative_shape,
        another_shape,
        no_alignment,
        pipe,
    )
}
