"""Writes files as a whole, and reads files that may be damaged or hostile."""

from __future__ import annotations

import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save as serialize_safetensors
from torch import Tensor

from dmp_common.errors import PatchError, file_error

USE = "dmp.use"  # the entry of a file's metadata that says what the patch is for
_LONGEST_NUMBER = 64  # characters; a 64-bit integer has 20, a double at most 25


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a safetensors file; equal contents give equal bytes.

    The metadata is sorted here, because the library writes it in an order that changes from process
    to process.
    """
    data = serialize_safetensors(dict(tensors), metadata=dict(metadata))
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is never seen half-written, not even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files of `tempfile` could not be read by other users, such as the account of a host.
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with name.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def open_regular(path: Path, expected: str = "a file") -> BinaryIO:
    """Opens a regular file for reading.

    Folders, pipes, sockets and devices are refused at once: reading a pipe without a writer would
    wait forever, and a device has no end.

    Args:
        path: the file.
        expected: what the file should be, for error messages.

    Raises:
        PatchError: the file does not exist, is not a regular file, or cannot be read.
    """
    try:
        _require_regular(os.stat(path), path, expected)
        # Between the two calls a pipe may take the file's name; opening it must not wait either.
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    except OSError as error:
        raise _unreadable(path, expected, error) from error
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        # A path with a NUL character does not raise an OSError.
        raise file_error(path, expected, error, "check the path") from error
    try:
        _require_regular(os.fstat(file.fileno()), path, expected)
    except PatchError:
        file.close()
        raise
    return file


@contextmanager
def opened(path: Path, expected: str = "a file") -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file for reading, and yields it with its size in bytes.

    Raises:
        PatchError: as in `open_regular`, and if reading fails while the file is open.
    """
    try:
        with open_regular(path, expected) as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _unreadable(path, expected, error) from error


def read_bounded(path: Path, limit: int, expected: str = "a file") -> bytes:
    """Reads a regular file as a whole.

    Raises:
        PatchError: as in `open_regular`, and if the file has more than `limit` bytes.
    """
    with opened(path, expected) as (file, _):
        data = file.read(limit + 1)
    if len(data) > limit:
        bounded = f"{expected} of at most {limit:,} bytes"
        raise file_error(path, bounded, "a longer one", "check that it is the right file")
    return data


def parse_json(text: bytes | str) -> object:
    """Parses JSON from a file that may be damaged or hostile, in time linear in its length.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has a very long number.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, parse_int=_integer, parse_float=_real)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _integer(text: str) -> int:
    return int(_short(text))


def _real(text: str) -> float:
    return float(_short(text))


def _short(number: str) -> str:
    """Refuses long numbers: reading them takes quadratic time, and Python does not print them."""
    if len(number) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(number)} characters")
    return number


def _unreadable(path: Path, expected: str, error: OSError) -> PatchError:
    return file_error(path, expected, error.strerror or type(error).__name__, "check the path")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(status: os.stat_result, path: Path, expected: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise file_error(path, expected, "a folder", "name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise file_error(path, expected, "a pipe, a socket or a device", "name a regular file")


def use_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a file's metadata says a patch is for; empty where there is none, or no JSON."""
    try:
        use = parse_json(metadata.get(USE, "{}"))
    except ValueError:
        return {}
    return use if isinstance(use, dict) else {}
