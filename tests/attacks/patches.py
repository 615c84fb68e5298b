"""Hostile patch files: each function writes one and returns its path."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmp_common import Patch
from dmp_common.patch.file import write_patch_file

BASE = "digits"


def good(folder: Path, **variant: Any) -> Path:
    """A patch file as it should be, which the attacks change."""
    path = folder / "patch.safetensors"
    patch = Patch.create(BASE, **variant)
    write_patch_file(path, patch.variant, patch.tensors())
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, body: bytes = b"") -> bytes:
    """A safetensors file of a header (JSON, or its bytes) and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A patch file whose header entries and configuration were changed."""
    header, body = parts(path)
    config = json.loads(header["__metadata__"]["dmp.config"])
    change(header, config)
    header["__metadata__"]["dmp.config"] = json.dumps(config)
    path.write_bytes(joined(header, body))
    return path


def many_random_grids(folder: Path) -> Path:
    """Claims 65,536 grids that began at random, with the tensors of one."""
    return changed(
        good(folder),
        lambda _, c: c.update(grids=65536, grid=[1, 1], prompts=1, prompt_init="random"),
    )


def huge_prompts(folder: Path) -> Path:
    """Claims prompts of gigabytes at every site, consistently, with hardly any bytes."""

    def change(header: dict[str, Any], config: dict[str, Any]) -> None:
        config.update(grid=[256, 256], prompts=65536, gate="none")
        for name in [name for name in header if name.startswith("gate.")]:
            del header[name]
        place = 0
        for name, entry in header.items():
            if name != "__metadata__":
                entry["shape"] = [1, 65536, entry["shape"][2]]
                size = 4 * 65536 * entry["shape"][2]
                entry["data_offsets"] = [place, place + size]
                place += size

    return changed(good(folder), change)


def overlapping_tensors(folder: Path) -> Path:
    """All prompts on the same bytes."""

    def change(header: dict[str, Any], _: object) -> None:
        prompts = [entry for name, entry in header.items() if name.startswith("prompts.")]
        for entry in prompts:
            entry["data_offsets"] = prompts[0]["data_offsets"]

    return changed(good(folder), change)


def tensor_type(dtype: str) -> Callable[[Path], Path]:
    """A tensor of a type of numbers that is none of ours; torch lacks some of them."""

    def attack(folder: Path) -> Path:
        return changed(good(folder), lambda h, _: h["gate.bias"].update(dtype=dtype))

    attack.__name__ = f"type_{dtype.lower()}"
    return attack


def long_number(folder: Path) -> Path:
    """A number of 4,300 digits, which Python reads and refuses to print."""
    path = changed(good(folder), lambda _, c: c.update(prompts="NUMBER"))
    data = json.dumps(parts(path)[0]).replace('\\"NUMBER\\"', "9" * 4300)
    path.write_bytes(joined(data.encode(), parts(path)[1]))
    return path


def very_long_number(folder: Path) -> Path:
    """A number of four million digits, in the header itself."""
    path = good(folder)
    path.write_bytes(joined(b'{"a": ' + b"9" * 4_000_000 + b"}"))
    return path


def long_fraction(folder: Path) -> Path:
    """A fraction of four million digits."""
    path = good(folder)
    path.write_bytes(joined(b'{"a": 0.' + b"7" * 4_000_000 + b"}"))
    return path


def deep_header(folder: Path) -> Path:
    """A header of two million brackets."""
    path = good(folder)
    path.write_bytes(joined(b"[" * 2_000_000))
    return path


def deep_config(folder: Path) -> Path:
    """A configuration of a million brackets."""
    path = good(folder)
    header, body = parts(path)
    header["__metadata__"]["dmp.config"] = '{"base": ' * 300_000
    path.write_bytes(joined(header, body))
    return path


def long_names(folder: Path) -> Path:
    """Names of tensors with a megabyte of terminal codes."""

    def change(header: dict[str, Any], _: object) -> None:
        header["\x1b]0;" + "\u202e" * 500_000] = header.pop("gate.bias")

    return changed(good(folder), change)


def long_base(folder: Path) -> Path:
    """The name of the base is a megabyte of line ends."""
    return changed(good(folder), lambda _, c: c.update(base="\r\n" * 500_000))


def many_sites(folder: Path) -> Path:
    """A hundred thousand sites."""
    return changed(
        good(folder), lambda _, c: c.update(sites={f"block.{n}": n for n in range(100_000)})
    )


def infinite_shift(folder: Path) -> Path:
    """A frequency shift that is no number, as JSON of Python allows."""
    return changed(good(folder), lambda _, c: c.update(frequency_shift=float("nan")))


def _with_values(folder: Path, dtype: torch.dtype, value: float, **variant: Any) -> Path:
    """A patch file with one value in a prompt, or in all grids of one prompt."""
    path = good(folder, **variant)
    patch = Patch.create(BASE, **variant)
    write_patch_file(path, patch.variant, patch.tensors(), dtype=dtype)
    header, body = parts(path)
    data, entry = bytearray(body), next(e for n, e in header.items() if n.startswith("prompts."))
    item = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
    grids, prompts, width = entry["shape"]
    for grid in range(grids):
        place = entry["data_offsets"][0] + grid * prompts * width * len(item)
        data[place : place + len(item)] = item
    path.write_bytes(joined(header, bytes(data)))
    return path


def overflowing_prompt(folder: Path) -> Path:
    """1e5, which bfloat16 holds and a model in float16 does not."""
    return _with_values(folder, torch.bfloat16, 1e5)


def overflowing_prompt_float32(folder: Path) -> Path:
    """The same in a file of float32."""
    return _with_values(folder, torch.float32, 1e5)


def infinite_prompt(folder: Path) -> Path:
    """1e5 in a file of float16, where it is infinite."""
    return _with_values(folder, torch.float16, 1e5)


def overflowing_sum(folder: Path) -> Path:
    """Three grids whose sum no half precision holds."""
    return _with_values(folder, torch.float32, 4e4, grids=3, gate_unit="grid", gate_form="residual")


def pipe(folder: Path) -> Path:
    """A pipe without a writer: reading it waits forever."""
    path = folder / "patch.safetensors"
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)
    return path


def link_to_device(folder: Path) -> Path:
    """A link to a device without an end."""
    path = folder / "patch.safetensors"
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no such device")
    path.symlink_to("/dev/zero")
    return path


def dangling_link(folder: Path) -> Path:
    """A link to nothing."""
    path = folder / "patch.safetensors"
    try:
        path.symlink_to(folder / "nothing")
    except OSError:
        pytest.skip("links need a permission here")
    return path


def unix_socket(folder: Path) -> Path:
    """A socket with a patch's name."""
    path = folder / "patch.safetensors"
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this system has no such sockets")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the address may be about a hundred characters long
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)
    return path


def folder_named_so(folder: Path) -> Path:
    """A folder with a patch's name."""
    path = folder / "patch.safetensors"
    path.mkdir()
    return path


def repeated_tensor(folder: Path) -> Path:
    """A tensor named twice, the second time on other bytes."""
    path = good(folder)
    header, body = parts(path)
    again = json.dumps({"gate.bias": {**header["gate.bias"], "dtype": "I8"}})[1:]
    path.write_bytes(joined((json.dumps(header)[:-1] + ", " + again).encode(), body))
    return path


PATCHES: dict[str, Callable[[Path], Path]] = {
    attack.__name__: attack
    for attack in (
        many_random_grids,
        huge_prompts,
        overlapping_tensors,
        *(tensor_type(name) for name in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3", "C64")),
        long_number,
        very_long_number,
        long_fraction,
        deep_header,
        deep_config,
        long_names,
        long_base,
        many_sites,
        infinite_shift,
        overflowing_prompt,
        overflowing_prompt_float32,
        infinite_prompt,
        overflowing_sum,
        pipe,
        link_to_device,
        dangling_link,
        unix_socket,
        folder_named_so,
        repeated_tensor,
    )
}
# What only the values of the tensors show, which `inspect` does not read.
IN_VALUES = {
    "overflowing_prompt",
    "overflowing_prompt_float32",
    "infinite_prompt",
    "overflowing_sum",
}
