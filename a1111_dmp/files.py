"""The folder of patches: finds the file of each name that users see, and loads it."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from dmp_common import Patch, PatchError
from dmp_common.attach.record import LoadedPatch
from dmp_common.patch.file import file_hash

NONE = "None"  # Drop-downs show this where no patch is chosen.
_SUFFIX = ".safetensors"
_KEPT = 6  # How many loaded patches are kept. Each takes about 10 MB, and its cache of fields.


class Known(NamedTuple):
    """A loaded patch with its name in the folder and the hash of its file, as hosts show it."""

    name: str
    loaded: LoadedPatch
    hash: str


class Folder:
    """A folder of patch files. The name of a patch is its path in the folder, without the ending.

    Args:
        root: the folder, which need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: OrderedDict[tuple[object, ...], Known] = OrderedDict()

    def names(self) -> list[str]:
        """Lists the names of the patches that users can choose from."""
        return sorted(self._files(), key=str.casefold)

    def find(self, name: str) -> Path:
        """Finds the file of a patch by its name.

        The subfolder may be left out where only one file has this name. A request can never reach
        a file outside of the folder.

        Raises:
            PatchError: there is no such file, or there are several.
        """
        return self._files()[self.full_name(name)]

    def full_name(self, name: str) -> str:
        """Completes the name of a patch whose subfolder may have been left out.

        Raises:
            PatchError: there is no such file, or there are several.
        """
        files = self._files()
        asked = name.replace("\\", "/").removesuffix(_SUFFIX)
        if asked in files:
            return asked
        alike = [known for known in files if known.rsplit("/", 1)[-1] == asked]
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise PatchError(
                f"expected the name of one patch, found {name!r} for {', '.join(sorted(alike))}: "
                "give the subfolder too."
            )
        shown = ", ".join(sorted(files, key=str.casefold)[:10]) or "nothing"
        raise PatchError(
            f"expected the name of a patch in {self.root}, found {name!r}: put the file there, or "
            f"choose one of those in it ({shown})."
        )

    def load(self, name: str) -> Known:
        """Loads a patch. A file that was loaded before and has not changed is not read again.

        Raises:
            PatchError: there is no such file, it is not a patch, or it is damaged.
        """
        full = self.full_name(name)
        path = self.find(full)
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        known = self._loaded.pop(key, None)
        if known is None:
            # Forge calls us in inference mode. Tensors made there could not be cached.
            with torch.inference_mode(False), torch.no_grad():
                known = Known(full, LoadedPatch(Patch.load(path), path), file_hash(path))
        self._loaded[key] = known
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        return known

    def by_hash(self, name: str, digest: str | None) -> str:
        """Finds the name of a patch from an infotext, also after its file was renamed.

        Where neither the name nor the hash is found, the name is returned as it is, so that the
        error message can show it.
        """
        files = self._files()
        if name in files or not digest:
            return name
        return next((known for known, path in files.items() if file_hash(path) == digest), name)

    def _files(self) -> dict[str, Path]:
        """Maps the name of each patch to its path."""
        found: dict[str, Path] = {}
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                path = Path(folder) / name
                # A pipe or a link to nothing is no patch, whatever it is called.
                if path.suffix == _SUFFIX and not name.startswith(".") and path.is_file():
                    found[path.relative_to(self.root).as_posix().removesuffix(_SUFFIX)] = path
        return found
