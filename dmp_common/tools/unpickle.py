"""Reading `torch.save` files without running anything a file asks for.

Such a file is a zip archive with a pickle in it, and a pickle may name any function and have it
called. Here it may only describe tensors; everything else it names becomes an inert stand-in.
`torch.load` with a restricted unpickler would not do: it runs TorchScript archives by itself,
gives the pickle torch's own functions to set attributes on, and reads every tensor there is,
a whole backbone for the three that we want.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmp_common.errors import PatchError

_MAX_PICKLE = 64 * 1024**2  # with an optimizer's state of every weight it is below one
_MAX_BYTES = 1024**3  # of one tensor that is read
_START = b"PK\x03\x04"
_SAVE_AGAIN = "load it where you trust it and save its state dict with torch.save again"
_BROKEN = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what the readers raise on a damaged or hostile file


class TorchFile:
    """A `torch.save` file, open for reading; a context manager.

    Args:
        path: of the file, in the zip format (PyTorch 1.6 and later).

    Raises:
        PatchError: from any use of it: no such file, another format, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile
        self._root = ""

    def __enter__(self) -> TorchFile:
        try:
            with self.path.open("rb") as file:
                start = file.read(len(_START))
            if start == _START:
                self._zip = zipfile.ZipFile(self.path)
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise self._error(found, "check the path") from error
        except _BROKEN as error:
            raise self._broken(error) from error
        if start != _START:
            raise self._error(f"one that begins with {start!r}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._zip.close()

    def contents(self) -> object:
        """What was saved: containers, numbers and text, `StoredTensor`s, and inert stand-ins."""
        try:
            pickles = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} pickles in the archive")
            self._root = pickles[0].removesuffix("data.pkl")
            data = io.BytesIO(self._record("data.pkl", _MAX_PICKLE))
            return _Unpickler(data, encoding="utf-8").load()
        except (*_BROKEN, OSError) as error:
            raise self._broken(error) from error

    def values(self, tensor: StoredTensor) -> Tensor:
        """The values of a tensor, float32, on the CPU."""
        try:
            order = sys.byteorder.encode()
            if f"{self._root}byteorder" in self._zip.namelist():
                order = self._record("byteorder", len(b"little"))
            if order != sys.byteorder.encode():
                raise ValueError(f"values stored {order!r} endian on a {sys.byteorder} machine")
            data = bytearray(self._record(f"data/{tensor.storage.key}", _MAX_BYTES))
            dtype = tensor.storage.dtype
            if dtype is None:
                raise ValueError("values that are no floating point numbers")
            count, rest = divmod(len(data), dtype.itemsize)
            # Strides of 0 could give a few values any size.
            if rest or not 0 < math.prod(tensor.shape) <= count:
                raise ValueError(f"{len(data)} bytes of {dtype} for the shape {tensor.shape}")
            stored = torch.frombuffer(data, dtype=dtype)
            view = stored.as_strided(tensor.shape, tensor.stride, tensor.offset)  # checks bounds
            return view.to(torch.float32, copy=True).contiguous()
        except (*_BROKEN, OSError) as error:
            raise self._broken(error) from error

    def _record(self, name: str, limit: int) -> bytes:
        info = self._zip.getinfo(self._root + name)
        # torch.save never compresses, so no record can grow beyond the file it is in.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise ValueError(f"a compressed or very large record {name}")
        return self._zip.read(info)

    def _broken(self, error: Exception) -> PatchError:
        return self._error(f"a damaged or unusual one ({type(error).__name__}: {error})"[:300])

    def _error(self, found: str, remedy: str = _SAVE_AGAIN) -> PatchError:
        expected = "expected a file that torch.save wrote in its zip format"
        return PatchError(f"{self.path}: {expected}, found {found}: {remedy}.")


class _Inert:
    """Stands in for whatever a pickle names: accepts anything, keeps nothing, does nothing.

    The methods are those a pickle can call. All that `find_class` returns must have
    `__setstate__`, on the class too, or a pickle could set attributes there.
    """

    def __new__(cls, *args: object, **options: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None: ...

    def __call__(self, *args: object) -> _Inert:
        return _Inert()

    def __setstate__(self, *state: object) -> None: ...

    def __setitem__(self, *item: object) -> None: ...

    def append(self, *item: object) -> None:
        """Ignores it, and so do the others."""

    extend = add = append


class _Dict(dict[Any, Any]):
    """For `OrderedDict`, without the attributes that a pickle can set on one."""

    def __setstate__(self, *state: object) -> None: ...


class _Storage(NamedTuple):
    """A record of values; the type is None where we would not take them."""

    key: str
    dtype: torch.dtype | None


class StoredTensor(_Inert):
    """A tensor that is still in its file: the shape, and which values of which storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    # In `__new__`, because a pickle can make an object without calling `__init__`.
    def __new__(
        cls, storage: object, offset: object, shape: object, stride: object, *_: object
    ) -> Any:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor without storage")
        self = super().__new__(cls)
        self.storage, (self.offset,) = storage, _counts((offset,))
        self.shape, self.stride = _counts(shape), _counts(stride)
        return self


class _Parameter(_Inert):
    """A parameter is the tensor it wraps."""

    def __new__(cls, data: object, *_: object) -> Any:
        return data


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(n) is not int or n < 0 for n in value):
        raise TypeError("a tensor without a proper shape, stride or offset")
    return value


# All that a pickle gets for the names in it; a dtype stands for the storage type that has it.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): StoredTensor,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return _KNOWN.get((module_name, global_name), _Inert)

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", kind, str(key), _, _):
                return _Storage(key, kind if isinstance(kind, torch.dtype) else None)
        raise pickle.UnpicklingError("a reference that is no storage")
