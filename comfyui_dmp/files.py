"""The patch files that ComfyUI's users choose from."""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path

import folder_paths

from dmp_common import Patch
from dmp_common.attach.record import LoadedPatch, PatchRecord

FOLDER = "dmp"  # The folder of patches in ComfyUI's models folder.
_LISTED = 10  # names of files that a message lists

_loaded: weakref.WeakValueDictionary[tuple[object, ...], LoadedPatch] = (
    weakref.WeakValueDictionary()
)


def register_folder() -> None:
    """Registers models/dmp with ComfyUI, in addition to folders of extra_model_paths.yaml."""
    folder = Path(folder_paths.models_dir) / FOLDER
    # Where the models folder is read-only, the other registered folders can still be used.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(folder))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})


def patch_files() -> list[str]:
    """Lists the patch files that users can choose from, as paths inside the folder."""
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names


def refusal(*names: str | None) -> str | None:
    """Returns what to tell a user of a workflow whose patch files are missing, None if all exist.

    Args:
        names: the files that the workflow names; None for those that another node will give.
    """
    known = patch_files()
    missing = [str(name) for name in names if name is not None and name not in known]
    if not missing:
        return None
    listed = ", ".join(known[:_LISTED]) + ", ..." * (len(known) > _LISTED) or "no patch at all"
    return (
        f"expected {' and '.join(missing)} in {folder_paths.get_folder_paths(FOLDER)[0]}, found "
        f"{listed}: get the file from where the workflow came from, put it there and press R; make "
        "a patch for your model with the template dmp-train-repair or dmp-train-guidance; or "
        "choose another one."
    )


def load(name: str) -> PatchRecord:
    """Loads a patch file by its name in the list. A patch that is still in use is not read again.

    Raises:
        PatchError: the file is not a patch, or it is damaged.
    """
    path = Path(folder_paths.get_full_path_or_raise(FOLDER, name))
    key = (str(path), *_state(path))
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = LoadedPatch(Patch.load(path), path)
        _loaded[key] = loaded
    return PatchRecord(loaded)


def fingerprint(name: str) -> str:
    """Returns a text that changes whenever the patch file is replaced."""
    path = folder_paths.get_full_path(FOLDER, name)
    return "" if path is None else str((path, *_state(Path(path))))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
