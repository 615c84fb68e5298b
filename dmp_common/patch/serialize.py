"""Writing safetensors files: equal contents as equal bytes, and never half a file."""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as serialize_safetensors
from torch import Tensor


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of these tensors; equal contents give equal bytes.

    The library writes the metadata in an order that changes from process to process.
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
    # Not tempfile: its files are closed to other users, such as the account a host runs under.
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
