"""Downloads files of the Hugging Face hub, and uploads files in one commit.

The client, `huggingface_hub`, is imported where it is used, because hosts need not have it.
Versions 0.24 to 2 work; they use different HTTP libraries and so raise different errors. The
client's environment variables apply: HF_ENDPOINT for another hub, HF_TOKEN, HF_HOME for the cache,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmp_common.errors import PatchError
from dmp_common.version import LIBRARY, __version__

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings that mean a local file
_PATIENCE = 10.0  # seconds to wait for a list of files


def resolve(
    source: str | os.PathLike[str],
    *,
    filename: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Returns the local path of a patch; a file of the hub is downloaded into the cache if needed.

    A text "user/repo" is a repository of the hub, unless it is an existing local path or has the
    ending of a file. Anything else is a local path, also "user/repo/patch.safetensors", so that a
    mistyped path is never sent to a server. The file of a repository is named by `filename`.

    Args:
        source: a path, or a repository "user/repo".
        filename: the file in the repository or folder; not needed if the repository (or its
            subfolder) has exactly one `.safetensors` file. Without a connection only the files in
            the cache count.
        subfolder: the folder of the file in the repository, or below the local path.
        revision: branch, tag or commit of the repository.
        token: token of the hub; None takes that of the client's login, False sends none.
        cache_dir: folder for downloads, in place of the client's cache.
        local_files_only: whether to use the cache alone, without any server.
        force_download: whether to download the file even if it is in the cache.

    Raises:
        PatchError: there is no client, no connection, or no such repository, revision or file; or
            there are several files to choose from. A local path is not checked.
    """
    text = os.fspath(source)
    local = Path(text).expanduser()
    named = isinstance(source, str) and is_repository(text)
    if not named or text.lower().endswith(_FILES) or local.exists():
        return local.joinpath(*(part for part in (subfolder, filename) if part is not None))
    if filename is not None and not filename.endswith(".safetensors"):
        raise PatchError(
            f"expected the name of a .safetensors file in {text}, found {filename!r}: patches are "
            "nothing else; convert the file first, or name another one."
        )
    if local_files_only and force_download:
        raise PatchError(
            f"expected one of local_files_only and force_download for {text}, found both: leave "
            "one out."
        )
    if filename is not None and subfolder is not None:
        filename = f"{subfolder.strip('/')}/{filename}"
    client = _client(token)
    where: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    with _explained(text, revision, filename, local_files_only):
        if filename is None:
            filename = _only_patch(text, _files(client, text, **where), subfolder)
        return Path(client.hf_hub_download(text, filename, force_download=force_download, **where))


def is_repository(text: str) -> bool:
    """Tells whether a text has the form of a repository's name, "user/repo"."""
    return _REPOSITORY.fullmatch(text) is not None


def require_repository(repo_id: str) -> None:
    """Checks the name of a repository.

    Raises:
        PatchError: the name is not of the form "user/repo".
    """
    if not is_repository(repo_id):
        raise PatchError(f'expected a repository as "user/repo", found {repo_id!r}: name one.')


def push_files(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    token: str | bool | None = None,
    private: bool = False,
    message: str = "Upload files",
) -> str:
    """Uploads files in one commit; makes the repository if it does not exist.

    Args:
        repo_id: the repository, "user/repo".
        files: for each path in the repository, the contents; existing files are replaced.
        token: a token with the right to write; None takes that of the client's login.
        private: whether a repository that is made now is private.
        message: the message of the commit.

    Returns:
        The repository's address.

    Raises:
        PatchError: the name is bad, or there is no client, no connection, or no permission.
    """
    require_repository(repo_id)
    client = _client(token)
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(name, data) for name, data in files.items()]
    with _explained(repo_id):
        address = client.create_repo(repo_id, private=private, exist_ok=True)
        client.create_commit(repo_id, additions, commit_message=message)
    return str(address)


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
    """Returns the module of the client's errors; `Any`, because its types differ by version."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _unreachable() -> tuple[type[Exception], ...]:
    """Returns the errors that the client raises without a connection.

    They are OSErrors if the client uses `requests`. Otherwise they are errors of its HTTP library,
    from which the client's own error for bad answers is derived too.
    """
    return (OSError, *_errors().HfHubHTTPError.__bases__)


def _files(
    client: Any,
    repo_id: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> list[str]:
    """Lists the files in a repository or, without a connection, those in the cache."""
    if not local_files_only:
        try:
            # `list_repo_files` is not used: without a connection it tries for half a minute.
            found = client.model_info(repo_id, revision=revision, timeout=_PATIENCE).siblings
            return [file.rfilename for file in found or ()]
        except _errors().HfHubHTTPError:
            raise  # the hub has answered, so its cache must not hide the error
        except _unreachable():
            pass  # the files in the cache are listed below
    cached = client.snapshot_download(
        repo_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=True,
        allow_patterns="*.safetensors",
    )
    return [path.relative_to(cached).as_posix() for path in Path(cached).rglob("*")]


def _only_patch(repo_id: str, files: Sequence[str], subfolder: str | None) -> str:
    place, prefix = repo_id, ""
    if subfolder is not None:
        place, prefix = f"{repo_id}, folder {subfolder}", f"{subfolder.strip('/')}/"
    found = sorted(n for n in files if n.startswith(prefix) and n.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "") or "none"
    remedy = "name one with filename=" if found else "check the repository's name"
    raise PatchError(f"expected one .safetensors file in {place}, found {listed}: {remedy}.")


@contextlib.contextmanager
def _explained(
    repo_id: str,
    revision: str | None = None,
    filename: str | None = None,
    local_files_only: bool = False,
) -> Iterator[None]:
    """Turns the client's errors into a `PatchError` that says what to do."""
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
        cause = error
        if local_files_only:
            found, remedy = "no such file in the cache", "download it without local_files_only"
        else:
            found, remedy = "no connection", "go online, or give the path of a local file"
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
