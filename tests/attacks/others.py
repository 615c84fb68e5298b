"""Hostile base models, options and training data: each function writes a file, returns its path."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.attacks.patches import joined, parts


def _index(folder: Path, content: str) -> Path:
    """A diffusers folder with this index of its weights."""
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content, "utf-8")
    return folder


def deep_index(folder: Path) -> Path:
    """An index nested a million deep."""
    return _index(folder, '{"weight_map": ' + "[" * 1_000_000)


def index_of_long_number(folder: Path) -> Path:
    """An index with a number of four million digits."""
    return _index(folder, '{"weight_map": ' + "8" * 4_000_000 + "}")


def index_of_other_folders(folder: Path) -> Path:
    """An index that names a file outside of its folder."""
    return _index(folder, json.dumps({"weight_map": {"a.weight": "../../secret.safetensors"}}))


def index_of_a_missing_tensor(folder: Path) -> Path:
    """An index that names a tensor which its file lacks."""
    save_file({"b.weight": torch.zeros(2)}, folder / "x.safetensors")
    return _index(folder, json.dumps({"weight_map": {"a.weight": "x.safetensors"}}))


def index_that_is_a_pipe(folder: Path) -> Path:
    """An index that nobody writes to."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "diffusion_pytorch_model.safetensors.index.json")
    return folder


def weights_that_are_a_pipe(folder: Path) -> Path:
    """Weights that nobody writes to."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def model_of_unknown_numbers(folder: Path) -> Path:
    """A time embedding whose type of numbers torch lacks."""
    path = folder / "model.safetensors"
    names = [f"time_embedding.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    save_file({name: torch.zeros(64, dtype=torch.uint8) for name in names}, path)
    header, body = parts(path)
    for name in names:
        header[name].update(dtype="F4", shape=[128])
    path.write_bytes(joined(header, body))
    return path


def model_of_terminal_codes(folder: Path) -> Path:
    """Names of tensors that clear a terminal."""
    path = folder / "model.safetensors"
    save_file({f"\x1b[2J\u202e{n}" * 500: torch.zeros(1) for n in range(3)}, path)
    return path


MODELS: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        deep_index,
        index_of_long_number,
        index_of_other_folders,
        index_of_a_missing_tensor,
        index_that_is_a_pipe,
        weights_that_are_a_pipe,
        model_of_unknown_numbers,
        model_of_terminal_codes,
    )
}


def _toml(folder: Path, content: str) -> Path:
    path = folder / "run.toml"
    path.write_text(content, "utf-8")
    return path


def deep_toml(folder: Path) -> Path:
    """An array nested a hundred thousand deep."""
    return _toml(folder, "a = " + "[" * 100_000)


def deep_inline_toml(folder: Path) -> Path:
    """Tables nested fifty thousand deep."""
    return _toml(folder, "a = " + "{a = " * 50_000)


def dotted_toml(folder: Path) -> Path:
    """A key of three hundred thousand parts."""
    return _toml(folder, "a." * 300_000 + "a = 1")


def long_toml(folder: Path) -> Path:
    """Ten megabytes of options."""
    return _toml(folder, "# padding\n" * 1_000_000)


def toml_that_is_a_pipe(folder: Path) -> Path:
    """Options that nobody writes."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "run.toml")
    return folder / "run.toml"


OPTIONS: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (deep_toml, deep_inline_toml, dotted_toml, long_toml, toml_that_is_a_pipe)
}


def compressed_shard(folder: Path) -> Path:
    """A shard of 300 KB that unpacks to 300 MB."""
    path = folder / "0.tar"
    with gzip.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = 300 * 2**20
        tar.addfile(entry, _Zeros())
    return path


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return b"\0" * size


def shard_with_holes(folder: Path) -> Path:
    """A file of four gigabytes in a shard of a kilobyte, by holes in it."""
    path = folder / "0.tar"
    entry = tarfile.TarInfo("a.png")
    entry.type, entry.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"37777777000\0"  # the one piece of data begins near four gigabytes
    header[398:410] = b"00000001000\0"
    header[483:495] = b"37777777777\0"  # the size with its holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + b"\0" * 512 + b"\0" * 1024)
    return path


def shard_of_long_names(folder: Path) -> Path:
    """Ten thousand headers, each of which says that the next name is long."""
    path = folder / "0.tar"
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes((entry.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * 10_000)
    return path


def shard_of_one_name(folder: Path) -> Path:
    """The same file twice."""
    path = folder / "0.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            entry = tarfile.TarInfo("\x1b[2Ja.png")
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
    return path


def shard_that_is_a_pipe(folder: Path) -> Path:
    """A shard that nobody writes."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "0.tar")
    return folder / "0.tar"


SHARDS: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        compressed_shard,
        shard_with_holes,
        shard_of_long_names,
        shard_of_one_name,
        shard_that_is_a_pipe,
    )
}


def deep_metadata(folder: Path) -> Path:
    """A line of metadata nested a million deep."""
    path = folder / "metadata.jsonl"
    path.write_text('{"file_name": ' + "[" * 1_000_000, "utf-8")
    return folder


def metadata_of_long_number(folder: Path) -> Path:
    """A line of metadata with a number of four million digits."""
    path = folder / "metadata.jsonl"
    path.write_text('{"file_name": ' + "7" * 4_000_000 + "}", "utf-8")
    return folder


def metadata_of_a_long_field(folder: Path) -> Path:
    """A table with a field of a megabyte, which Python's reader refuses."""
    path = folder / "metadata.csv"
    path.write_text("file_name,text\na.png," + "x" * 2**20, "utf-8")
    return folder


def metadata_of_terminal_codes(folder: Path) -> Path:
    """A file name that clears a terminal."""
    path = folder / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": 3, "\x1b[2J": "\u202e" * 10_000}), "utf-8")
    return folder


def metadata_of_a_long_path(folder: Path) -> Path:
    """A file name longer than any system allows."""
    path = folder / "metadata.jsonl"
    path.write_text(json.dumps({"file_name": "x" * 100_000}), "utf-8")
    return folder


def metadata_of_too_many_fields(folder: Path) -> Path:
    """A row with more fields than the table has names, and no image."""
    path = folder / "metadata.csv"
    path.write_text("text\na,b,c\n", "utf-8")
    return folder


METADATA: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        deep_metadata,
        metadata_of_long_number,
        metadata_of_a_long_field,
        metadata_of_terminal_codes,
        metadata_of_a_long_path,
        metadata_of_too_many_fields,
    )
}
