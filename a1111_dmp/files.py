"""The folder of patches: their names as users see them, and the files behind."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from dmp_common import Patch, PatchError
from dmp_common.attach.record import LoadedPatch
from dmp_common.patch.file import file_hash

NONE = "None"  # what drop-downs show where no patch is chosen
_SUFFIX = ".safetensors"
_KEPT = 6  # loaded patches; ten megabytes each and what they remember


class Known(NamedTuple):
    """A patch of the folder: its name there, itself, and its file's hash as hosts show it."""

    name: str
    loaded: LoadedPatch
    hash: str


class Folder:
    """A folder of patch files; names are paths in it without the ending.

    Args:
        root: the folder, which need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: OrderedDict[tuple[object, ...], Known] = OrderedDict()

    def names(self) -> list[str]:
        """The patches users can choose, by name."""
        return sorted(self._files(), key=str.casefold)

    def find(self, name: str) -> Path:
        """The file of a patch, by its name, or by the name of its file alone where that is clear.

        Nothing outside of the folder is ever found, whatever a request asks for.

        Raises:
            PatchError: no such file, or several.
        """
        return self._files()[self.full_name(name)]

    def full_name(self, name: str) -> str:
        """The name of a patch in the folder, from one that may lack its subfolder.

        Raises:
            PatchError: no such file, or several.
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
        """A patch of the folder; a file that was loaded before is not read again.

        Raises:
            PatchError: no such file, not a patch, or a damaged one.
        """
        full = self.full_name(name)
        path = self.find(full)
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        known = self._loaded.pop(key, None)
        if known is None:
            # Forge activates extra networks in inference mode, whose tensors cannot be remembered.
            with torch.inference_mode(False), torch.no_grad():
                known = Known(full, LoadedPatch(Patch.load(path), path), file_hash(path))
        self._loaded[key] = known
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        return known

    def by_hash(self, name: str, digest: str | None) -> str:
        """The name of a patch that an infotext tells of: its own, or that of a renamed file.

        The name itself where neither is found, so that the message can say so.
        """
        files = self._files()
        if name in files or not digest:
            return name
        return next((known for known, path in files.items() if file_hash(path) == digest), name)

    def _files(self) -> dict[str, Path]:
        """Path of each patch by its name."""
        found: dict[str, Path] = {}
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                path = Path(folder) / name
                if path.suffix == _SUFFIX and not name.startswith("."):
                    found[path.relative_to(self.root).as_posix().removesuffix(_SUFFIX)] = path
        return found
