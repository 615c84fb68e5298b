"""Download and upload with the real client, against a server on this machine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download

from dmp_common import Patch, PatchError, bases, register_base
from dmp_common.tools.hub import push_files, resolve
from dmp_common.tools.publish import push_to_hub
from tests.hub_server import TOKEN, Hub

BASE = register_base(
    bases.dit("hub-dit/2", depth=2, width=8, patch_size=2, grid=(2, 2), hub_id="someone/hub-dit")
)
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
CLIENT = (HfApi, snapshot_download)  # loads the modules whose settings the tests change


def set_client(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Sets what an environment variable sets when the client is imported, in all its versions."""
    client = [module for key, module in sys.modules.items() if key.startswith("huggingface_hub.")]
    for module in client:
        if name in vars(module):
            monkeypatch.setattr(module, name, value)


def connect(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As HF_ENDPOINT does."""
    set_client(monkeypatch, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    set_client(monkeypatch, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    set_client(monkeypatch, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_client(monkeypatch, "HF_HUB_OFFLINE", False)
    if reset := getattr(sys.modules["huggingface_hub.utils._http"], "reset_sessions", None):
        reset()  # before 1.0 a session keeps whether it was offline
    server = Hub()
    connect(monkeypatch, server.endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def some_patch(**variant: object) -> Patch:
    patch = Patch.create(BASE, **variant).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_(generator=draw)
    return patch


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "nice.safetensors"
    some_patch().save(path, {"ss_steps": "100", "ss_note": "a|b\n<i>c", "modelspec.author": "Me"})
    return path


def same(one: Patch, other: Patch) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(mine[n].equal(theirs[n]) for n in mine)


@pytest.mark.parametrize(
    "source",
    [
        "p.safetensors",
        "user/p.safetensors",
        "user/p.pt",
        "user/repo/sub/p.safetensors",
        "plain",
        "./user/repo",
        "../repo",
        "/user/repo",
        "C:/repo",
        r"user\repo",
        r"C:\user\repo",
        Path("user/repo"),
        "",
    ],
)
def test_paths_stay_paths(monkeypatch: pytest.MonkeyPatch, source: str | Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # the client is not even imported
    assert resolve(source) == Path(source)


def test_home_existing_folders_and_files_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert resolve("~/p.safetensors") == Path.home() / "p.safetensors"
    Path("user/repo").mkdir(parents=True)
    assert resolve("user/repo") == Path("user/repo")
    assert resolve("user/repo", filename="p.safetensors") == Path("user/repo/p.safetensors")


def test_download_the_only_patch_of_a_repository(hub: Hub, saved: Path) -> None:
    hub.repositories["me/nice"] = {"README.md": b"hi", "sub/p.safetensors": saved.read_bytes()}
    patch = Patch.load("me/nice")
    assert same(patch, some_patch())
    assert patch.metadata["ss_steps"] == "100"
    # A second time the file itself comes from the cache.
    hub.requests.clear()
    path = resolve("me/nice", revision="main")
    assert path.name == "p.safetensors"
    assert [
        request for request in hub.requests if "GET" in request and "resolve" in request[1]
    ] == []


def test_download_without_a_connection_takes_the_cache(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/nice"] = {"p.safetensors": saved.read_bytes()}
    online = resolve("me/nice")
    connect(monkeypatch, NOWHERE)
    assert resolve("me/nice") == online
    assert resolve("me/nice", filename="p.safetensors") == online
    set_client(monkeypatch, "HF_HUB_OFFLINE", True)  # no waiting either
    assert resolve("me/nice") == online
    for filename in (None, "p.safetensors"):
        with pytest.raises(PatchError, match=r"me/other, found no connection: go online, or give"):
            resolve("me/other", filename=filename)


def test_several_patches_need_a_name(hub: Hub, saved: Path) -> None:
    hub.repositories["me/two"] = {"a.safetensors": b"", "sub/b.safetensors": saved.read_bytes()}
    with pytest.raises(PatchError, match=r"me/two, found a\.safetensors, sub/b.*filename="):
        resolve("me/two")
    patch = Patch.load("me/two", filename="sub/b.safetensors")
    assert same(patch, some_patch())


def test_subfolder(hub: Hub, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    hub.repositories["me/two"] = {"a.safetensors": b"", "sub/b.safetensors": data}
    hub.repositories["me/two"] |= {"sub2/c.safetensors": b"", "sub2/d.safetensors": b""}
    assert resolve("me/two", subfolder="sub").read_bytes() == data
    for subfolder in ("sub", "sub/"):
        path = resolve("me/two", subfolder=subfolder, filename="b.safetensors")
        assert path.parts[-2:] == ("sub", "b.safetensors")
    with pytest.raises(PatchError, match=r"me/two, folder sub2, found sub2/c.*, sub2/d.*filename="):
        resolve("me/two", subfolder="sub2")
    with pytest.raises(PatchError, match=r"found no file 'sub/a\.safetensors' in it"):
        resolve("me/two", subfolder="sub", filename="a.safetensors")
    folder = tmp_path / "here"
    folder.mkdir()
    found = resolve(str(folder), subfolder="sub", filename="b.safetensors")
    assert found == folder / "sub" / "b.safetensors"


def test_cache_folder_local_files_and_new_downloads(hub: Hub, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    hub.repositories["me/nice"] = {"p.safetensors": data}
    own = tmp_path / "own"
    for options in ({}, {"filename": "p.safetensors"}):
        with pytest.raises(PatchError, match=r"no such file in the cache: download it"):
            resolve("me/nice", local_files_only=True, cache_dir=own, **options)
    assert hub.requests == []
    path = resolve("me/nice", cache_dir=own)
    assert own in path.parents
    hub.requests.clear()
    for options in ({}, {"filename": "p.safetensors"}):
        assert resolve("me/nice", local_files_only=True, cache_dir=own, **options) == path
    assert hub.requests == []
    path.write_bytes(b"damaged")
    assert resolve("me/nice", cache_dir=own).read_bytes() == b"damaged"
    assert resolve("me/nice", cache_dir=own, force_download=True).read_bytes() == data
    with pytest.raises(PatchError, match="one of local_files_only and force_download"):
        resolve("me/nice", local_files_only=True, force_download=True)


def test_what_is_not_there_is_named(hub: Hub, saved: Path) -> None:
    hub.repositories["me/none"] = {"README.md": b"hi", "model.bin": b""}
    for options, message in (
        ({}, r"one \.safetensors file in me/none, found none"),
        ({"filename": "x.safetensors"}, r"me/none, found no file 'x\.safetensors' in it"),
        ({"revision": "v9"}, "me/none at revision v9, found no such revision"),
        ({"revision": "v9", "filename": "x.safetensors"}, "at revision v9, found no such revision"),
        ({"filename": "model.bin"}, "found 'model.bin': patches are nothing else"),
    ):
        with pytest.raises(PatchError, match=message):
            resolve("me/none", **options)
    for options in ({}, {"filename": "x.safetensors"}):
        with pytest.raises(PatchError, match="me/other, found none that may be seen"):
            resolve("me/other", **options)
    with pytest.raises(PatchError, match="found a bad name"):
        resolve("me/a..b")
    hub.status = 403
    with pytest.raises(PatchError, match=r"found a refusal .*403"):
        resolve("me/none")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Patch.load("me/nice"), lambda: push_to_hub(saved, "me/nice")):
        with pytest.raises(PatchError, match="pip install huggingface_hub"):
            call()
    assert same(Patch.load(saved), some_patch())  # a file needs none


def test_push_makes_one_commit_that_can_be_loaded(hub: Hub, saved: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cat 1.png"
    picture.write_bytes(b"png")
    options = {"token": TOKEN}
    url = push_to_hub(
        saved,
        "me/nice",
        license="mit",
        tags=["cats"],
        pictures={"A cat": picture},
        private=True,
        message="First",
        **options,
    )
    assert url == f"{hub.endpoint}/me/nice"
    made = hub.created[0]
    assert made.get("private") is True or made["visibility"] == "private"  # by version
    files = hub.repositories["me/nice"]
    assert hub.commits == [{"message": "First", "files": sorted(files)}]
    assert sorted(files) == ["README.md", "nice.safetensors", "pictures/cat 1.png"]
    assert files["nice.safetensors"] == saved.read_bytes()
    assert files["pictures/cat 1.png"] == b"png"
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "someone/hub-dit")
    assert same(Patch.load("me/nice"), some_patch())
    # Into the same repository again, from an object: named after the repository.
    some_patch(gate="none").push_to_hub("me/nice", **options)
    assert [commit["files"] for commit in hub.commits][1:] == [["README.md", "nice.safetensors"]]
    assert Patch.load("me/nice").variant.gate == "none"


def test_push_refuses_before_anything_is_sent(hub: Hub, saved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(saved.read_bytes()[:-4])
    twice = {"one": tmp_path / "a" / "x.png", "two": tmp_path / "b" / "x.png"}
    for path in twice.values():
        path.parent.mkdir()
        path.write_bytes(b"png")
    for patch, repository, pictures, message in (
        (broken, "me/nice", {}, "broken.safetensors"),
        (saved, "nice", {}, 'expected a repository as "user/repo", found .nice.'),
        (saved, "me/nice", {"a": tmp_path / "no.png"}, r"a picture at .*no\.png, found No such"),
        (saved, "me/nice", twice, r"different names, found pictures/x\.png, pictures/x"),
    ):
        with pytest.raises(PatchError, match=message):
            push_to_hub(patch, repository, pictures=pictures, token=TOKEN)
    assert hub.requests == []


def test_push_without_permission_or_connection(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PatchError, match=r"me/nice, found .*token"):
        push_to_hub(saved, "me/nice", token="hf_reader")
    assert hub.commits == []
    connect(monkeypatch, NOWHERE)
    with pytest.raises(PatchError, match=r"me/nice, found no connection .*: go online"):
        push_to_hub(saved, "me/nice", token=TOKEN)


def test_push_files_without_a_patch(hub: Hub) -> None:
    files = {"README.md": b"hi", "sub/a.bin": b"1"}
    address = push_files("me/any", files, token=TOKEN, message="Say hi")
    assert address == f"{hub.endpoint}/me/any"
    assert hub.repositories["me/any"] == files
    assert hub.commits == [{"message": "Say hi", "files": sorted(files)}]
