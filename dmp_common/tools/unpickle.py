"""Reads files of `torch.save` without running anything that a file asks for.

Such a file is a zip archive with a pickle in it, and a pickle can have any function called. Here
it can only describe tensors; an inert object stands for everything else. `torch.load` with a
restricted unpickler is not enough: it runs TorchScript archives by itself, lets the pickle set
attributes on torch's own functions, and reads every tensor of the file, although we need three.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import zipfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dmp_common.errors import PatchError, file_error, printable
from dmp_common.patch.serialize import opened
from dmp_common.tools.pickles import Storage, StoredTensor, read_pickle

_MAX_PICKLE = 16 * 1024**2  # with the optimizer's state of every weight a pickle has less than 1 MB
_MAX_BYTES = 4 * 1024**3  # the largest record of values
_START = b"PK\x03\x04"
_SAVE_AGAIN = "load it where you trust it and save its state dict with torch.save again"
_BROKEN = (
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what the readers raise on a damaged or hostile file


class TorchFile:
    """A file of `torch.save`, as a context manager that opens it for reading.

    Memory in use is at most a small multiple of the file's size: a record of values is read once,
    and tensors that share a storage share its memory, as they do in torch.

    Args:
        path: the file, in the zip format (PyTorch 1.6 and later).

    Raises:
        PatchError: every method raises it if the file does not exist, has another format, or is
            damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._files = contextlib.ExitStack()
        self._zip: zipfile.ZipFile
        self._root = ""
        self._unread = 0  # bytes of the file that no record has taken yet
        self._storages: dict[str, Tensor] = {}

    def __enter__(self) -> TorchFile:
        with contextlib.ExitStack() as files:
            expected = "a file that torch.save wrote"
            file, self.size = files.enter_context(opened(self.path, expected))
            self._unread = self.size
            start = file.read(len(_START))
            if start != _START:
                raise self._error(f"one that begins with {start!r}")
            try:
                self._zip = files.enter_context(zipfile.ZipFile(file))
            except _BROKEN as error:
                raise self._broken(error) from error
            self._files = files.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._storages.clear()
        self._files.close()

    def contents(self) -> object:
        """Returns what was saved: containers, numbers, text, `StoredTensor`s and `Opaque`s."""
        try:
            pickles = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} pickles in the archive")
            self._root = pickles[0].removesuffix("data.pkl")
            return read_pickle(self._record("data.pkl", _MAX_PICKLE))
        except _BROKEN as error:
            raise self._broken(error) from error

    def values(self, tensor: StoredTensor) -> Tensor:
        """Reads a tensor in its own precision, as a view of its storage's memory on the CPU.

        Copy it before you keep or change it.
        """
        try:
            stored = self._values_of(tensor.storage)
            # With strides of 0 a few values could have any shape.
            if not 0 < math.prod(tensor.shape) <= len(stored):
                raise ValueError(f"{len(stored)} values for the shape {tensor.shape}")
            # `as_strided` checks the bounds.
            return stored.as_strided(tensor.shape, tensor.stride, tensor.offset)
        except _BROKEN as error:
            raise self._broken(error) from error

    def _values_of(self, storage: Storage) -> Tensor:
        if storage.dtype is None:
            raise ValueError("values that are no floating point numbers")
        if storage.key not in self._storages:
            if not self._storages:
                self._check_byteorder()
            data = bytearray(self._record(f"data/{storage.key}", _MAX_BYTES))
            if not data:
                raise ValueError(f"an empty record data/{storage.key}")
            self._storages[storage.key] = torch.frombuffer(data, dtype=torch.uint8)
        return self._storages[storage.key].view(storage.dtype)

    def _check_byteorder(self) -> None:
        order = sys.byteorder.encode()
        if f"{self._root}byteorder" in self._zip.NameToInfo:
            order = self._record("byteorder", len(b"little"))
        if order != sys.byteorder.encode():
            raise ValueError(f"values stored {order!r} endian on a {sys.byteorder} machine")

    def _record(self, name: str, limit: int) -> bytes:
        info = self._zip.getinfo(self._root + name)
        # torch.save never compresses, so no record can grow beyond the file it is in.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise ValueError(f"a compressed or very large record {name}")
        # Records that overlap could be read to many times the size of the file.
        self._unread -= info.file_size
        if self._unread < 0:
            raise ValueError("records that are longer than the file together")
        return self._zip.read(info)

    def _broken(self, error: Exception) -> PatchError:
        found = printable(f"{type(error).__name__}: {error}", 250)
        return self._error(f"a damaged or unusual one ({found})")

    def _error(self, found: str, remedy: str = _SAVE_AGAIN) -> PatchError:
        expected = "a file that torch.save wrote in its zip format"
        return file_error(self.path, expected, found, remedy)
