"""The folder of a run: nobody else writes there, nothing is overwritten, nothing is left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from dmp_common import PatchError
from training.options.command_line import resolve
from training.run.folder import STATE, RunFolder, saved
from training.run.state import find_states

Make = Callable[..., RunFolder]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    def folder(**options: object) -> RunFolder:
        return RunFolder(
            resolve({"base": "digits", "output_dir": str(tmp_path), "output_name": "a", **options})
        )

    return folder


def test_a_second_run_of_one_name_stops_while_the_first_writes(folder: Make) -> None:
    with folder().claimed():
        with (
            pytest.raises(PatchError, match="found another run that writes it now"),
            folder().claimed(),
        ):
            pass
        with folder(output_name="b").claimed():  # another name in the same folder is no matter
            pass
    with folder().claimed():
        pass


def test_the_lock_of_a_killed_run_does_not_matter(folder: Make, tmp_path: Path) -> None:
    (tmp_path / ".a.lock").write_bytes(b"")
    with folder().claimed():
        pass
    assert not list(tmp_path.iterdir())


def test_another_process_holds_the_lock(folder: Make, tmp_path: Path) -> None:
    other = FileLock(tmp_path / ".a.lock")
    with other, pytest.raises(PatchError, match="wait for its end"), folder().claimed():
        pass


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("a.safetensors", "another --output_name, or --overwrite"),
        ("a-step00000002.safetensors", "another --output_name, or --overwrite"),
        ("a-step00000002-state", "--resume latest to go on with it"),
    ],
)
def test_an_earlier_run_is_not_overwritten(
    found: str, told: str, folder: Make, tmp_path: Path
) -> None:
    (tmp_path / found).mkdir() if found.endswith("state") else (tmp_path / found).write_bytes(b"x")
    with pytest.raises(PatchError) as caught, folder().claimed():
        pass
    assert found in str(caught.value)
    assert told in str(caught.value)
    for more in ({"overwrite": True}, {"resume": "latest"}):
        with folder(**more).claimed():
            pass
    assert (tmp_path / found).exists()


def test_clearing_takes_what_the_run_saved_and_nothing_else(folder: Make, tmp_path: Path) -> None:
    mine = ["a-step00000002.safetensors", "a-step00000002-gate.png", "a-step00000002-state"]
    others = ["a.safetensors", "a-b-step00000002.safetensors", "ab-step00000002-state", "a-step1.x"]
    for name in mine + others:
        (tmp_path / name).mkdir() if name.endswith("state") else (tmp_path / name).touch()
    folder().clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_leftovers_of_a_kill_go(folder: Make, tmp_path: Path) -> None:
    (tmp_path / ".a.safetensors.0f0f0f0f.tmp").write_bytes(b"half")
    (tmp_path / ".a-step00000002-state.tmp").mkdir()
    (tmp_path / ".a-step00000002-state.tmp" / "values.safetensors").write_bytes(b"half")
    (tmp_path / ".other.tmp").write_bytes(b"of another run")
    with folder(overwrite=True).claimed():
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".other.tmp"]


def test_a_folder_that_was_being_replaced_is_put_back(folder: Make, tmp_path: Path) -> None:
    """The kill came between taking away the old one and giving its name to the new one."""
    (tmp_path / ".a-step00000002-state.old").mkdir()
    (tmp_path / ".a-step00000002-state.old" / "state.json").write_bytes(b"{}")
    (tmp_path / ".a-step00000004-state.old").mkdir()
    (tmp_path / "a-step00000004-state").mkdir()
    with folder(resume="latest").claimed():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-step00000002-state",
        "a-step00000004-state",
    ]


def test_names_are_no_patterns(folder: Make, tmp_path: Path) -> None:
    (tmp_path / ".ab.tmp").write_bytes(b"of another run")
    with folder(output_name="a[b]").claimed():
        pass
    assert (tmp_path / ".ab.tmp").exists()


def test_a_name_with_brackets_finds_what_it_saved(tmp_path: Path) -> None:
    for name in ("a[b]-step00000010-state", "a[b]-step00000002.safetensors", "ab-step00000004"):
        (tmp_path / name).mkdir() if name.endswith("state") else (tmp_path / name).touch()
    (tmp_path / "a[b]-step00000010-state" / "state.json").touch()
    assert [(save.step, save.kind) for save in saved(tmp_path, "a[b]")] == [
        (2, ".safetensors"),
        (10, STATE),
    ]
    assert list(find_states(tmp_path, "a[b]")) == [10]
    assert saved(tmp_path / "nowhere", "a") == []
