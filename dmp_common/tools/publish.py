"""Publishes a patch on the Hugging Face hub, with its model card and pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dmp_common.errors import PatchError
from dmp_common.patch.file import PatchContents, read_patch_file
from dmp_common.tools.card import model_card
from dmp_common.tools.hub import push_files, require_repository


class Saveable(Protocol):
    """A patch in memory, which can be saved to a file."""

    def save(self, path: Path, /) -> object:
        """Writes the patch to a file."""


def push_to_hub(
    patch: Saveable | str | os.PathLike[str],
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

    An existing card (README.md) is replaced. The file of a patch that is given as an object is
    named after the repository; a patch file keeps its name.

    Args:
        patch: a patch, or the path of a patch file, which is checked first.
        repo_id: the repository, "user/repo".
        token: a token with the right to write; None takes that of the client's login.
        private: whether a repository that is made now is private.
        base_model, license, tags: see `model_card`.
        pictures: for each caption, its image file; the folder `pictures` gets a copy.
        message: the message of the commit.

    Returns:
        The repository's address.

    Raises:
        PatchError: the patch file or a picture is bad, or there is no client, no connection, or no
            permission.
    """
    require_repository(repo_id)
    contents, name, data = _file(patch, repo_id.partition("/")[2])
    shown, images = _pictures(pictures or {})
    card = model_card(
        contents.variant,
        contents.metadata,
        repo_id=repo_id,
        filename=name,
        base_model=base_model,
        license=license,
        tags=tags,
        pictures=shown,
    )
    files = {name: data, "README.md": card.encode(), **images}
    return push_files(repo_id, files, token=token, private=private, message=message)


def _file(patch: Saveable | str | os.PathLike[str], stem: str) -> tuple[PatchContents, str, bytes]:
    """Returns the checked contents of the patch's file, its name and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(patch, (str, os.PathLike)):
            path = Path(patch).expanduser()
        else:
            path = Path(folder, f"{stem}.safetensors")
            patch.save(path)
        return read_patch_file(path), path.name, path.read_bytes()


def _pictures(
    pictures: Mapping[str, str | os.PathLike[str]],
) -> tuple[dict[str, str], dict[str, bytes]]:
    """Returns the name in the repository for each caption, and the file's bytes for each name."""
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
