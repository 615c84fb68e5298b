"""Reading of `torch.save` files: damaged ones are refused, hostile ones run nothing."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from dmp_common import PatchError
from dmp_common.tools import unpickle
from dmp_common.tools.convert import convert_official
from tests.official import learned, official, save


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"no\.pt: .*No such file.*check the path"):
        convert_official(tmp_path / "no.pt")
    with pytest.raises(PatchError, match="check the path"):
        convert_official(tmp_path)
    old = tmp_path / "old.pt"
    torch.save(official(), old, _use_new_zipfile_serialization=False)
    with pytest.raises(PatchError, match=r"old\.pt: .*zip format, found one that begins.*again"):
        convert_official(old)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(PatchError, match="0 pickles"):
        convert_official(other)


def rewritten(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint with some of its records replaced or added."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        old = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in (
            old | {f"{root}/{name}": data for name, data in records.items()}
        ).items():
            archive.writestr(name, data)
    return path


def test_compressed_other_endian_and_too_small_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    assert convert_official(rewritten(save(path, official()), {})).variant.mix == "add"
    with pytest.raises(PatchError, match="compressed"):
        convert_official(rewritten(save(path, official()), {}, zipfile.ZIP_DEFLATED))
    other = b"big" if sys.byteorder == "little" else b"little"
    with pytest.raises(PatchError, match="endian"):
        convert_official(rewritten(save(path, official()), {"byteorder": other}))
    with pytest.raises(PatchError, match="64 bytes of torch.float32"):
        convert_official(rewritten(save(path, official()), {"data/1": b"\0" * 64}))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "x.pt", {"model": learned(official())}).read_bytes()
    draw = torch.Generator().manual_seed(0)
    survived = 0
    for trial in range(300):
        data = bytearray(whole)
        if trial % 3:
            for place in torch.randint(4, len(data), (4,), generator=draw).tolist():
                data[place] ^= 1 << (trial % 8)
        else:
            data = data[: int(torch.randint(4, len(data), (), generator=draw))]
        path = tmp_path / "x.pt"
        path.write_bytes(data)
        with contextlib.suppress(PatchError):  # a flipped bit in an unused field does no harm
            convert_official(path, mix="add")
            survived += 1
    assert survived < 50


ordinary_load = torch.load  # also where a test watches calls of it


class Call:
    """Pickled as a call of a function, which an ordinary unpickler makes."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the calls of functions a hostile file would like to make."""
    made: list[str] = []

    def watch(owner: object, name: str) -> None:
        def record(*_: object, **__: object) -> None:
            made.append(name)

        record.__module__, record.__qualname__ = owner.__name__, name
        monkeypatch.setattr(owner, name, record)

    for owner, name in (
        (os, "system"),
        (builtins, "eval"),
        (torch.jit, "load"),
        (torch.hub, "load"),
        (torch, "load"),
        (copyreg, "_reconstructor"),
    ):
        watch(owner, name)
    return made


def functions() -> dict[str, object]:
    """The watched functions; the names are looked up when a test runs."""
    return {
        "system": os.system,
        "eval": eval,
        "jit": torch.jit.load,
        "hub": torch.hub.load,
        "load": torch.load,
        "copyreg": copyreg._reconstructor,
    }


PLACES = {
    "config": lambda evil: {"model": official(), "config": evil},
    "nested": lambda evil: {"model": official(), "opt": [{"a": ({"b": [evil]},)}]},
    "in the state dict": lambda evil: {"model": {**official(), "extra": evil}},
    "key": lambda evil: {"model": official(), evil: 1},
    "argument": lambda evil: {"model": official(), "x": Call(OrderedDict, [("a", evil)])},
    "set": lambda evil: {"model": official(), "x": {evil}},
}


@pytest.mark.parametrize("name", functions())
@pytest.mark.parametrize("place", PLACES)
def test_nothing_a_file_names_is_called(
    tmp_path: Path, calls: list[str], place: str, name: str
) -> None:
    contents = PLACES[place](Call(functions()[name], "argument"))
    path = save(tmp_path / "x.pt", contents)
    calls.clear()
    assert convert_official(path).variant.base == "convert-dit"
    assert calls == []
    ordinary_load(path, weights_only=False)  # the same file does harm where names are looked up
    assert functions()[name].__qualname__ in calls


def test_a_hostile_file_touches_no_disk(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = Call(eval, f"open({str(marker)!r}, 'w').close()")
    path = save(tmp_path / "x.pt", {"model": official(), "config": evil})
    convert_official(path)
    assert not marker.exists()
    ordinary_load(path, weights_only=False)
    assert marker.exists()


def test_a_torchscript_archive_is_not_run(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewritten(save(tmp_path / "x.pt", official()), {"constants.pkl": b"\x80\x02)."})
    assert convert_official(path).variant.mix == "add"
    assert calls == []


def _set_state(module: str, name: str, *, instance: bool) -> bytes:
    """A pickle that sets attributes on what a name stands for, or on an object made of it."""
    made = b")R" if instance else b""
    state = b"(N}X\x0c\x00\x00\x00__defaults__I1\nsX\x06\x00\x00\x00shadowI1\nst"
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + made + state + b"b."


@pytest.mark.parametrize(
    ("module", "name", "instance", "message"),
    [
        ("collections", "OrderedDict", False, "no tensors"),
        ("collections", "OrderedDict", True, "no tensors"),
        ("torch._utils", "_rebuild_tensor_v2", False, "no tensors"),
        ("torch._utils", "_rebuild_parameter", False, "no tensors"),
        ("torch", "FloatStorage", False, "'torch.dtype' object has no attribute"),
        ("builtins", "anything", False, "no tensors"),
        ("builtins", "anything", True, "no tensors"),
    ],
)
def test_a_pickle_changes_nothing_of_ours(
    tmp_path: Path, module: str, name: str, instance: bool, message: str
) -> None:
    known = [unpickle._Inert, *unpickle._KNOWN.values()]
    before = [sorted(dir(value)) for value in known]
    rebuild = torch._utils._rebuild_tensor_v2.__defaults__
    path = rewritten(
        save(tmp_path / "x.pt", {}), {"data.pkl": _set_state(module, name, instance=instance)}
    )
    with pytest.raises(PatchError, match=message):
        convert_official(path)
    assert [sorted(dir(value)) for value in known] == before
    assert torch._utils._rebuild_tensor_v2.__defaults__ == rebuild
    # And the next file is read as ever.
    assert convert_official(save(tmp_path / "y.pt", official())).variant.mix == "add"
