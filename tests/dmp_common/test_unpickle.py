"""Reading of `torch.save` files: damaged ones are refused, hostile ones run nothing."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmp_common import PatchError
from dmp_common.api import convert_official
from dmp_common.tools import pickles
from dmp_common.tools.unpickle import TorchFile
from tests.official import checkpoint, learned, official, save


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"no\.pt: .*No such file.*check the path"):
        convert_official(tmp_path / "no.pt")
    with pytest.raises(PatchError, match="a folder: name the file in it"):
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
    assert convert_official(rewritten(save(path, checkpoint(official())), {})).variant.mix == "add"
    with pytest.raises(PatchError, match="compressed"):
        convert_official(rewritten(save(path, official()), {}, zipfile.ZIP_DEFLATED))
    other = b"big" if sys.byteorder == "little" else b"little"
    with pytest.raises(PatchError, match="endian"):
        convert_official(rewritten(save(path, official()), {"byteorder": other}))
    with pytest.raises(PatchError, match="16 values for the shape"):
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
    "option": lambda evil: checkpoint(official(), uncond=evil),
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
    assert convert_official(path, mix="add").variant.base == "convert-dit"
    assert calls == []
    ordinary_load(path, weights_only=False)  # the same file does harm where names are looked up
    assert functions()[name].__qualname__ in calls


def test_a_hostile_file_touches_no_disk(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = Call(eval, f"open({str(marker)!r}, 'w').close()")
    path = save(tmp_path / "x.pt", {"model": official(), "config": evil})
    convert_official(path, mix="add")
    assert not marker.exists()
    ordinary_load(path, weights_only=False)
    assert marker.exists()


def test_a_torchscript_archive_is_not_run(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewritten(save(tmp_path / "x.pt", official()), {"constants.pkl": b"\x80\x02)."})
    assert convert_official(path, mix="add").variant.mix == "add"
    assert calls == []


def _set_state(module: str, name: str, *, instance: bool) -> bytes:
    """A pickle that sets attributes on what a name stands for, or on an object made of it."""
    made = b")R" if instance else b""
    state = b"(N}X\x0c\x00\x00\x00__defaults__I1\nsX\x06\x00\x00\x00shadowI1\nst"
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + made + state + b"b."


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "FloatStorage"),
        ("builtins", "anything"),
        ("dmp_common.tools.pickles", "Opaque"),
    ],
)
def test_a_pickle_changes_nothing_of_ours(
    tmp_path: Path, module: str, name: str, instance: bool
) -> None:
    known = [pickles.Opaque, pickles.Storage, pickles.StoredTensor]
    before = [sorted(dir(value)) for value in known]
    rebuild = torch._utils._rebuild_parameter.__defaults__
    path = rewritten(
        save(tmp_path / "x.pt", {}), {"data.pkl": _set_state(module, name, instance=instance)}
    )
    with pytest.raises(PatchError, match="no tensors"):
        convert_official(path)
    assert [sorted(dir(value)) for value in known] == before
    assert torch._utils._rebuild_parameter.__defaults__ == rebuild


def test_tensors_that_share_values_share_memory(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    path = save(tmp_path / "x.pt", {"a": flat[:12].view(3, 4), "b": flat.view(4, 6).T, "c": flat})
    with TorchFile(path) as file:
        stored = file.contents()
        assert isinstance(stored, dict)
        read = {name: file.values(tensor) for name, tensor in stored.items()}
    assert torch.equal(read["a"], flat[:12].view(3, 4))
    assert torch.equal(read["b"], flat.view(4, 6).T)
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 1


def objects() -> dict[str, object]:
    """What `torch.save` files hold besides tensors, and what we make of it."""
    return {
        "numbers": ([1, -2, 2**40, 1.5, True, None], [1, -2, 2**40, 1.5, True, None]),
        "text": (
            {"a": "\u00e9", "b": ("x", "y", "z", "w")},
            {"a": "\u00e9", "b": ("x", "y", "z", "w")},
        ),
        "ordered": (OrderedDict(a=1, b=OrderedDict(c=2)), {"a": 1, "b": {"c": 2}}),
        "keys that are no text": ({0: "a", (1, 2): "b", "c": 3}, {"c": 3}),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", objects())
def test_plain_data_is_read_exactly(name: str, protocol: int) -> None:
    saved, expected = objects()[name]  # type: ignore[misc]
    assert pickles.read_pickle(pickle.dumps(saved, protocol=protocol)) == expected


def test_shared_and_recursive_objects_are_read_once() -> None:
    shared: list[object] = [1]
    shared.append(shared)
    read = pickles.read_pickle(pickle.dumps({"a": shared, "b": shared}, protocol=2))
    assert isinstance(read, dict)
    assert read["a"] is read["b"]
    assert read["a"][1] is read["a"]


def test_objects_keep_their_plain_attributes() -> None:
    held = types.SimpleNamespace(size=3, inner=types.SimpleNamespace(name="x"))
    for protocol in (2, 4):
        read = pickles.read_pickle(pickle.dumps([held], protocol=protocol))
        assert isinstance(read, list)
        # A namespace is made by a call and then given its attributes, as most objects are.
        assert read[0].state["size"] == 3
        assert read[0].state["inner"].state == {"name": "x"}


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_escape_the_readers_errors(data: bytes) -> None:
    with contextlib.suppress(ArithmeticError, EOFError, LookupError, TypeError, ValueError):
        pickles.read_pickle(b"\x80\x02" + data)
