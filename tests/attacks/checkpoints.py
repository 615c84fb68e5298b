"""Hostile `torch.save` files: each function writes one and returns its path."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

_PROTO, _STOP = b"\x80\x02", b"."
_NESTED = 60


def text(value: str) -> bytes:
    """The instruction that pushes text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def archive(folder: Path, program: bytes, records: dict[str, bytes] | None = None) -> Path:
    """A file like those of `torch.save`, with a pickle of our making."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", _PROTO + program + _STOP)
        for name, data in (records or {}).items():
            made.writestr(f"archive/{name}", data)
    return path


def _storage(key: str, count: int) -> bytes:
    """The instructions that push a storage of float32."""
    return (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", count)
        + b"tQ"
    )


def _tensor(storage: bytes, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The instructions that push a tensor."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + numbers(shape)
        + numbers(stride)
        + b"\x89}tR"
    )


def nested_key(folder: Path) -> Path:
    """A key that is a tuple nested in itself 60 times: hashing it takes 2**60 steps."""
    pairs = b"".join(b"q\x00h\x00h\x00\x86" for _ in range(_NESTED))
    return archive(folder, b"}" + b"K\x01\x85" + pairs + b"K\x01s")


def nested_in_set(folder: Path) -> Path:
    """The same in a set."""
    path = folder / "model.pt"
    pairs = b"".join(b"q\x00h\x00h\x00\x86" for _ in range(_NESTED))
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x04\x8f(K\x01\x85" + pairs + b"\x90.")
    return path


def deep_key(folder: Path) -> Path:
    """A key nested 200,000 deep, which overflows the stack of the C language."""
    return archive(folder, b"}" + b")" + b"\x85" * 200_000 + b"K\x01s")


def deep_list(folder: Path) -> Path:
    """A value nested a hundred thousand deep."""
    return archive(folder, b"]" * 100_000 + b"a" * 99_999)


def deep_objects(folder: Path) -> Path:
    """Objects in objects, thirty thousand deep."""
    make = b"cbuiltins\nobject\n)\x81}" + text("a")
    return archive(folder, make * 30_000 + b"K\x01" + b"sb" * 30_000)


def large_memo_index(folder: Path) -> Path:
    """One remembered object with the index 2**28: a table of four gigabytes."""
    return archive(folder, b"}r" + struct.pack("<I", 2**28))


def many_tensors_on_one_storage(folder: Path) -> Path:
    """2,000 tensors of 2 MB on the same 2 MB."""
    count = 2**19
    storage = _storage("0", count)
    entries = b"".join(text(f"w{n}") + _tensor(storage, (count,), (1,)) for n in range(2000))
    return archive(folder, b"}(" + entries + b"u", {"data/0": b"\0" * (4 * count)})


def long_prefixes(folder: Path) -> Path:
    """A name with a million times `module.` before it."""
    storage = _tensor(_storage("0", 1), (1,), (1,))
    return archive(
        folder, b"}" + text("module." * 1_000_000 + "x") + storage + b"s", {"data/0": b"\0" * 4}
    )


def colliding_numbers(folder: Path) -> Path:
    """100,000 numbers as keys, all with the same hash."""
    keys = b"".join(pickle.dumps(n * (2**61 - 1), protocol=2)[2:-1] + b"N" for n in range(100_000))
    return archive(folder, b"}(" + keys + b"u")


def long_number(folder: Path) -> Path:
    """A number of three million decimal digits."""
    return archive(folder, b"}" + text("a") + b"L" + b"9" * 3_000_000 + b"L\ns")


def copied_arguments(folder: Path) -> Path:
    """A call with 300,000 arguments, made 100,000 times."""
    arguments = b"(" + b"N" * 300_000 + b"tq\x00"
    return archive(folder, arguments + b"cbuiltins\nlist\nq\x01" + b"h\x01h\x00R0" * 100_000)


def copied_entries(folder: Path) -> Path:
    """A dictionary made 100,000 times of the same 100,000 entries."""
    pairs = b"](" + b"".join(text(f"{n}") + b"N\x86" for n in range(100_000)) + b"e"
    start = pairs + b"\x85q\x00ccollections\nOrderedDict\nq\x01"
    return archive(folder, start + b"h\x01h\x00R0" * 100_000)


def long_shapes(folder: Path) -> Path:
    """Tensors with a shape of 300,000 numbers, made 100,000 times."""
    shape = b"(" + b"K\x01" * 300_000 + b"tq\x00"
    storage = _storage("0", 1) + b"q\x01"
    call = b"ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    return archive(
        folder, shape + storage + call + b"h\x02(h\x01K\x00h\x00h\x00tR0" * 100_000,
        {"data/0": b"\0" * 4},
    )  # fmt: skip


def endless_instructions(folder: Path) -> Path:
    """Fifteen million instructions, each of which makes an object."""
    return archive(folder, b"}" * 15_000_000)


def claimed_bytes(folder: Path) -> Path:
    """A byte array that claims to be a terabyte long."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.")
    return path


def repeated_values(folder: Path) -> Path:
    """Strides of zero: one number as a tensor of sixteen gigabytes."""
    tensor = _tensor(_storage("0", 1), (2**16, 2**16), (0, 0))
    return archive(folder, b"}" + text("prompt_embeddings") + tensor + b"s", {"data/0": b"\0" * 4})


def compressed(folder: Path) -> Path:
    """64 megabytes of zeros, compressed."""
    path = folder / "model.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made,
        made.open("archive/data.pkl", "w") as record,
    ):
        for _ in range(64):
            record.write(b"\0" * 2**20)
    return path


def overlapping_records(folder: Path) -> Path:
    """300 records of values that are all the same eight megabytes of the file."""
    count = 2**21
    entries = b"".join(
        text(f"w{n}") + _tensor(_storage(f"{n}", count), (count,), (1,)) for n in range(300)
    )
    path = archive(folder, b"}(" + entries + b"u", {"data/0": b"\0" * (4 * count)})
    with zipfile.ZipFile(path, "a") as made:
        first = made.getinfo("archive/data/0")
        for n in range(1, 300):
            other = zipfile.ZipInfo(f"archive/data/{n}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(other, name, getattr(first, name))
            made.filelist.append(other)
            made.NameToInfo[other.filename] = other
        made._didModify = True  # type: ignore[attr-defined]
    return path


def endless_blocks(folder: Path) -> Path:
    """A checkpoint of DiT-S/2 that claims ten thousand blocks, with nothing in them."""
    state = {
        "x_embedder.proj.weight": torch.zeros(384, 4, 2, 2),
        "final_layer.linear.weight": torch.zeros(32, 384),
        "y_embedder.embedding_table.weight": torch.zeros(11, 384),
        "pos_embed": torch.zeros(1, 16, 384),
        "blocks.0.attn.qkv.weight": torch.zeros(1152, 384),
        **{f"blocks.{n}.mlp.fc1.bias": torch.zeros(1) for n in range(9999)},
    }
    path = folder / "model.pt"
    torch.save(state, path)
    return path


def long_block_number(folder: Path) -> Path:
    """The number of a block has 5000 digits."""
    state = {
        "prompt_embeddings": torch.zeros(1, 256, 384),
        f"blocks.{'9' * 5000}.attn.qkv.weight": torch.zeros(1),
        "x_embedder.proj.weight": torch.zeros(384, 4, 3, 3),
    }
    path = folder / "model.pt"
    torch.save(state, path)
    return path


def terminal_codes(folder: Path) -> Path:
    """Names that would clear a terminal, or read as markup."""
    path = folder / "model.pt"
    torch.save({"\x1b[2J\u202e<b>" * 1000: torch.zeros(1)}, path)
    return path


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        nested_key,
        nested_in_set,
        deep_key,
        deep_list,
        deep_objects,
        large_memo_index,
        many_tensors_on_one_storage,
        long_prefixes,
        colliding_numbers,
        long_number,
        copied_arguments,
        copied_entries,
        long_shapes,
        endless_instructions,
        claimed_bytes,
        repeated_values,
        compressed,
        overlapping_records,
        endless_blocks,
        long_block_number,
        terminal_codes,
    )
}
