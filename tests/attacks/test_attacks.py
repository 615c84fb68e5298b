"""Every hostile file ends in the one error, at once and in little memory, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmp_common import Patch, PatchError
from dmp_common.__main__ import main
from tests.attacks.checkpoints import CHECKPOINTS
from tests.attacks.ggufs import GGUFS
from tests.attacks.others import METADATA, MODELS, OPTIONS, SHARDS
from tests.attacks.patches import IN_VALUES, PATCHES, good, tensor_type
from tests.attacks.running import MEGABYTES, SECONDS, Server

Attack = Callable[[Path], Path]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def require_refused(server: Server, path: Path, readers: tuple[str, ...]) -> None:
    """Has a file read by each reader; each must refuse it in the one way."""
    for reader in readers:
        answer = server.read(reader, path)
        assert answer.kind in ("PatchError", "ConfigError"), (reader, answer)
        assert answer.seconds < SECONDS, (reader, answer)
        assert answer.megabytes < MEGABYTES, (reader, answer)
        assert answer.text.isprintable(), (reader, answer)
        assert len(answer.text) < 3000, (reader, answer)


@pytest.mark.parametrize("attack", PATCHES.values(), ids=PATCHES)
def test_patches(attack: Attack, tmp_path: Path, server: Server) -> None:
    readers = ("load", "validate", "inspect")
    values_only = attack.__name__ in IN_VALUES
    require_refused(server, attack(tmp_path), readers[:2] if values_only else readers)


@pytest.mark.parametrize("attack", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(attack: Attack, tmp_path: Path, server: Server) -> None:
    require_refused(server, attack(tmp_path), ("convert", "base", "detect"))


@pytest.mark.parametrize("attack", MODELS.values(), ids=MODELS)
def test_models(attack: Attack, tmp_path: Path, server: Server) -> None:
    require_refused(server, attack(tmp_path), ("times",))


@pytest.mark.parametrize("attack", GGUFS.values(), ids=GGUFS)
def test_ggufs(attack: Attack, tmp_path: Path, server: Server) -> None:
    pytest.importorskip("gguf")
    require_refused(server, attack(tmp_path), ("student",))


@pytest.mark.parametrize("attack", OPTIONS.values(), ids=OPTIONS)
def test_options(attack: Attack, tmp_path: Path, server: Server) -> None:
    require_refused(server, attack(tmp_path), ("options", "dataset"))


@pytest.mark.parametrize("attack", SHARDS.values(), ids=SHARDS)
def test_shards(attack: Attack, tmp_path: Path, server: Server) -> None:
    pytest.importorskip("webdataset")
    require_refused(server, attack(tmp_path), ("shard",))


@pytest.mark.parametrize("attack", SHARDS.values(), ids=SHARDS)
def test_counting_shards(attack: Attack, tmp_path: Path, server: Server) -> None:
    """Only headers are read, so a count may be all that comes of it."""
    pytest.importorskip("webdataset")
    answer = server.read("count", attack(tmp_path))
    assert answer.kind in ("", "PatchError"), answer
    assert answer.seconds < SECONDS
    assert answer.megabytes < MEGABYTES


@pytest.mark.parametrize("attack", METADATA.values(), ids=METADATA)
def test_metadata(attack: Attack, tmp_path: Path, server: Server) -> None:
    require_refused(server, attack(tmp_path), ("metadata",))


def test_the_limits_are_watched(tmp_path: Path, server: Server) -> None:
    """What the tests above compare with their limits is measured."""
    path = good(tmp_path)
    answer = server.read("load", path)
    assert answer.kind == ""
    assert 0 < answer.seconds < SECONDS
    assert Patch.load(path).saved_parameters > 0


def test_a_bad_file_does_not_keep_others_from_being_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    bad = tensor_type("F4")(tmp_path / "a")
    files = [good(tmp_path / "b"), bad, good(tmp_path / "c")]
    assert main(["validate", *map(str, files)]) == 1
    out, err = capsys.readouterr()
    assert out.count("OK ") == 2
    assert err.count("error: ") == 1


@pytest.mark.parametrize("value", ["\x1b[31m", "\u202egnp.exe", "a\u2028b", "\x00", "\ud800"])
def test_paths_are_shown_as_escapes(value: str, tmp_path: Path) -> None:
    with pytest.raises(PatchError) as caught:
        Patch.load(tmp_path / f"{value}.safetensors")
    text = str(caught.value)
    assert text.isprintable()
    assert value not in text
