"""Patches on the Hugging Face hub: download by the repository's name, upload with a model card.

The client, `huggingface_hub`, is imported where it is used: hosts need not have it. Versions 0.24
to 2 serve; they differ in their HTTP library and so in what they raise. Its environment variables
hold: HF_ENDPOINT for another hub, HF_TOKEN, HF_HOME for the cache, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmp_common.api import Patch
from dmp_common.errors import PatchError
from dmp_common.tools.card import LIBRARY, model_card
from dmp_common.version import __version__

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings that mean a local file
_PATIENCE = 10.0  # seconds to wait for a list of files


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    filename: str | None = None,
) -> Path:
    """The local path of a patch; downloaded first (and kept in the client's cache) if need be.

    A text "user/repo" is a repository of the hub, unless such a path exists here or it ends like
    a file. Anything else is a local path, also "user/repo/patch.safetensors": a mistyped path
    must not become a question to a server. So a file of a repository goes into `filename`.

    Args:
        source: a path, or "user/repo".
        revision: branch, tag or commit of the repository.
        token: of the hub; None takes the one of its login, False none.
        filename: the file in the repository or folder; not needed where a repository has one
            `.safetensors` file alone (without a connection: in the cache).

    Raises:
        PatchError: no client, no connection, no such repository, revision or file, or several
            files to choose from. Whether a local path exists is left to its reader.
    """
    text = os.fspath(source)
    local = Path(text).expanduser()
    named = isinstance(source, str) and _REPOSITORY.fullmatch(text) is not None
    if not named or text.lower().endswith(_FILES) or local.exists():
        return local if filename is None else local / filename
    if filename is not None and not filename.endswith(".safetensors"):
        raise PatchError(
            f"expected the name of a .safetensors file in {text}, found {filename!r}: patches are "
            "nothing else; convert the file first, or name another one."
        )
    client = _client(token)
    with _explained(text, revision, filename):
        if filename is None:
            filename = _only_patch(text, _files(client, text, revision))
        return Path(client.hf_hub_download(text, filename, revision=revision))


def push_to_hub(
    patch: Patch | str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
    message: str = "Upload a diffusion model patch",
) -> str:
    """Uploads a patch, its model card and pictures in one commit; makes the repository if needed.

    A card (README.md) that is there already is replaced. A patch given as an object is named
    after the repository, a file keeps its name.

    Args:
        patch: a patch or a patch file, which is checked first.
        repo_id: "user/repo".
        token: with the right to write; None takes the one of the client's login.
        private: of a repository that is made now.
        base_model, license, tags: see `model_card`.
        pictures: caption to image file; they land in the folder `pictures`.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        PatchError: a bad patch file or picture, no client, no connection, or no permission.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise PatchError(f'expected a repository as "user/repo", found {repo_id!r}: name one.')
    checked, name, data = _file(patch, repo_id.partition("/")[2])
    shown, images = _pictures(pictures or {})
    card = model_card(
        checked,
        repo_id=repo_id,
        filename=name,
        base_model=base_model,
        license=license,
        tags=tags,
        pictures=shown,
    )
    files = {name: data, "README.md": card.encode(), **images}
    client = _client(token)
    with _explained(repo_id, None, None):
        address = client.create_repo(repo_id, private=private, exist_ok=True)
        _commit(client, repo_id, files, message)
    return str(address)


def _file(patch: Patch | str | os.PathLike[str], stem: str) -> tuple[Patch, str, bytes]:
    """A patch as its file has it, checked; the file's name and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(patch, Patch):
            path = Path(folder, f"{stem}.safetensors")
            patch.save(path)
        else:
            path = Path(patch).expanduser()
        return Patch.load(path), path.name, path.read_bytes()


def _commit(client: Any, repo_id: str, files: Mapping[str, bytes], message: str) -> None:
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, data) for name, data in files.items()]
    client.create_commit(repo_id, additions, commit_message=message)


def _pictures(
    pictures: Mapping[str, str | os.PathLike[str]],
) -> tuple[dict[str, str], dict[str, bytes]]:
    """Caption to name in the repository, and that name to the file's bytes."""
    shown = {caption: f"pictures/{Path(path).name}" for caption, path in pictures.items()}
    if len(set(shown.values())) < len(shown):
        found = ", ".join(shown.values())
        raise PatchError(f"expected pictures of different names, found {found}: rename one.")
    try:
        return shown, {shown[c]: Path(path).read_bytes() for c, path in pictures.items()}
    except OSError as error:
        raise PatchError(
            f"expected a picture at {error.filename}, found {error.strerror}: check the path."
        ) from error


def _client(token: str | bool | None) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise PatchError(
            "expected the package huggingface_hub for patches on the hub, found none: "
            "`pip install huggingface_hub`, or give the path of a local file."
        ) from error
    return huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)


def _errors() -> Any:
    """The module with the client's errors; `Any`, for it declares them differently by version."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _unreachable() -> tuple[type[Exception], ...]:
    """What the client raises without a connection: an OSError if it is built on requests, and
    otherwise a relative of its own error for answers, which has that library's as a base."""
    return (OSError, *_errors().HfHubHTTPError.__bases__)


def _files(client: Any, repo_id: str, revision: str | None) -> list[str]:
    """Names of the files in a repository; without a connection, of those in the cache."""
    try:
        # Not `list_repo_files`: without a connection that one tries for half a minute.
        found = client.model_info(repo_id, revision=revision, timeout=_PATIENCE).siblings
        return [file.rfilename for file in found or ()]
    except _errors().HfHubHTTPError:
        raise  # the hub answered
    except _unreachable():
        cached = client.snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns="*.safetensors"
        )
        return [path.relative_to(cached).as_posix() for path in Path(cached).rglob("*")]


def _only_patch(repo_id: str, files: Sequence[str]) -> str:
    found = sorted(name for name in files if name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "") or "none"
    remedy = "name one with filename=" if found else "check the repository's name"
    raise PatchError(f"expected one .safetensors file in {repo_id}, found {listed}: {remedy}.")


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None, filename: str | None) -> Iterator[None]:
    """Turns what the client raises into errors that say what to do."""
    errors = _errors()
    where = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        yield
    except errors.RepositoryNotFoundError as error:  # also private and gated ones
        found, remedy = "none that may be seen", "check the name, accept its terms, or give a token"
        cause: Exception = error
    except errors.RevisionNotFoundError as error:
        found, remedy, cause = "no such revision", "name a branch, tag or commit of it", error
    except errors.LocalEntryNotFoundError as error:  # without a connection and not in the cache
        found, remedy, cause = "no connection", "go online, or give the path of a local file", error
    except errors.EntryNotFoundError as error:
        found, remedy, cause = f"no file {filename!r} in it", "name one of its files", error
    except errors.HFValidationError as error:
        found, remedy, cause = f"a bad name ({error})", 'name it as "user/repo"', error
    except errors.HfHubHTTPError as error:
        found, cause = f"a refusal ({_line(error)})", error
        remedy = "log in (`hf auth login`) or give another token if it says so, else try later"
    except _unreachable() as error:
        found, cause = f"no connection ({type(error).__name__}: {_line(error)})", error
        remedy = "go online, or give the path of a local file"
    else:
        return
    raise PatchError(f"expected the hub repository {where}, found {found}: {remedy}.") from cause


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
