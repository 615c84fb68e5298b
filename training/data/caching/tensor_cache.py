"""Tensors by key, in memory or in files that are checked when they are read."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.serialize import write_atomically

_FORMAT = 1  # goes into every key: files of another format are never read
_CHECKSUM = "crc32"
BROKEN = "broken"  # an entry of tensors that only fill a place


def cache_key(**facts: Any) -> str:
    """The key of what follows from `facts`: everything the tensors depend on."""
    text = json.dumps({"format": _FORMAT, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


class DamagedError(PatchError):
    """A cache file that does not hold what was written."""


class TensorCache:
    """Named tensors by key.

    Args:
        folder: of the files, one for each key; None keeps all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, dict[str, Tensor]] = {}

    def path(self, key: str) -> Path:
        """The file of a key. 256 folders: many files in one are slow on some systems."""
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def state(self, key: str) -> str:
        """`good`, `missing`, `damaged` or `broken`; reads the whole file.

        `broken` entries only fill the place of what could not be made: the next run tries again.
        """
        if self.folder is None:
            return "good" if key in self._memory else "missing"
        if not self.path(key).is_file():
            return "missing"
        try:
            return "broken" if BROKEN in self.read(key) else "good"
        except DamagedError:
            return "damaged"

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key.

        Raises:
            DamagedError: the file is not as it was written.
            PatchError: there is none.
        """
        if self.folder is None:
            return self._memory[key]
        path = self.path(key)
        try:
            tensors = parse_safetensors(path.read_bytes())
            written = int(tensors.pop(_CHECKSUM))
        except (SafetensorError, KeyError, ValueError) as error:
            raise _damaged(path) from error
        except OSError as error:
            raise PatchError(
                f"expected the cache file {path}, found: {error.strerror}: start again, it is then "
                "made again."
            ) from error
        if _checksum(tensors) != written:
            raise _damaged(path)
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> int:
        """Keeps the tensors of a key; returns their bytes.

        Raises:
            PatchError: the folder cannot be written, or the disk is full.
        """
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        if self.folder is None:
            self._memory[key] = tensors
            return sum(tensor.nbytes for tensor in tensors.values())
        data = serialize_safetensors({**tensors, _CHECKSUM: torch.tensor(_checksum(tensors))})
        try:
            write_atomically(self.path(key), data)
        except OSError as error:
            raise PatchError(
                f"expected to write the cache in {self.folder}, found: {error.strerror}: give "
                "another --cache_dir, or make room; what is written already is kept."
            ) from error
        return len(data)


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        # Bytes, not numbers: numpy has no bfloat16.
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _damaged(path: Path) -> DamagedError:
    return DamagedError(
        f"expected the cache file {path} as it was written, found it damaged: start again, it is "
        "then made again."
    )
