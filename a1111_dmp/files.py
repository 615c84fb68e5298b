"""The folder of patches: finds the file of each name that users see, and loads it."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dmp_common import Patch, PatchError
from dmp_common.attach.record import LoadedPatch
from dmp_common.errors import printable_path
from dmp_common.patch.file import file_hash
from dmp_common.tools.inspect import inspect_file

NONE = "None"  # Drop-downs show this where no patch is chosen.
_SUFFIX = ".safetensors"
_MARK = re.compile(r" \[[^\[\]]+\]$")
_Fact = TypeVar("_Fact")
KEPT = 6  # How many loaded patches are kept. Each takes about 10 MB, and its cache of fields.


class Known(NamedTuple):
    """A loaded patch with its name in the folder and the hash of its file, as hosts show it."""

    name: str
    loaded: LoadedPatch
    hash: str


class Folder:
    """A folder of patch files. The name of a patch is its path in the folder, without the ending.

    Args:
        root: the folder, which need not exist.
        kept: returns how many loaded patches are kept in memory.
    """

    def __init__(self, root: Path, kept: Callable[[], int] = lambda: KEPT) -> None:
        self.root, self._kept = root, kept
        self._loaded: OrderedDict[tuple[object, ...], Known] = OrderedDict()
        self._facts: dict[tuple[str, Path], tuple[tuple[int, int], Any]] = {}

    def names(self) -> list[str]:
        """Lists the names of the patches that users can choose from."""
        return list(self.files())

    def find(self, name: str) -> Path:
        """Finds the file of a patch by its name.

        The subfolder may be left out where only one file has this name, and so may the ending. A
        request can never reach a file outside of the folder.

        Raises:
            PatchError: there is no such file, or there are several.
        """
        return self._found(name)[1]

    def full_name(self, name: str) -> str:
        """Completes the name of a patch whose subfolder may have been left out.

        Raises:
            PatchError: there is no such file, or there are several.
        """
        return self._found(name)[0]

    def load(self, name: str) -> Known:
        """Loads a patch. A file that was loaded before and has not changed is not read again.

        Raises:
            PatchError: there is no such file, it is not a patch, or it is damaged.
        """
        full, path = self._found(name)
        key = (str(path), *_stamp(path))
        known = self._loaded.pop(key, None)
        if known is None:
            # Forge calls us in inference mode. Tensors made there could not be cached.
            with torch.inference_mode(False), torch.no_grad():
                known = self._told(path, lambda: self._read(full, path))
        self._loaded[key] = known
        while len(self._loaded) > max(self._kept(), 1):
            self._loaded.popitem(last=False)
        return known

    def described(self, path: Path) -> dict[str, Any]:
        """Returns the record of `inspect_file` of a file in the folder.

        Raises:
            PatchError: the file is no patch.
        """
        record: dict[str, Any] | PatchError = self._fact("record", path, self._record)
        if isinstance(record, PatchError):
            raise PatchError(str(record))
        return record

    def by_hash(self, name: str, digest: str | None) -> str:
        """Finds the name of a patch from an infotext, also after its file was renamed.

        Where neither the name nor the hash is found, the name is returned as it is, so that the
        error message can show it.
        """
        files = self.files()
        if name in files or not digest:
            return name
        alike = (n for n, path in files.items() if self._fact("hash", path, file_hash) == digest)
        return next(alike, name)

    def files(self) -> dict[str, Path]:
        """Maps the name of each patch to its path, sorted by name.

        A folder that is reached in several ways, by links, counts once, by its own name if it has
        one here. So links to a folder around them end too.
        """
        found: dict[str, Path] = {}
        seen: set[str] = set()
        waiting = [str(self.root)]
        while waiting:
            for folder, inside, names in os.walk(waiting.pop(0)):
                real = os.path.realpath(folder)
                if real in seen:
                    inside.clear()
                    continue
                seen.add(real)
                paths = [os.path.join(folder, name) for name in sorted(inside)]
                waiting += [path for path in paths if os.path.realpath(path) != _inside(real, path)]
                for name in names:
                    path = Path(folder) / name
                    # A pipe or a link to nothing is no patch, whatever it is called.
                    if path.suffix == _SUFFIX and not name.startswith(".") and path.is_file():
                        found[path.relative_to(self.root).as_posix()[: -len(_SUFFIX)]] = path
        return dict(sorted(found.items(), key=lambda item: (item[0].casefold(), item[0])))

    def _found(self, name: str) -> tuple[str, Path]:
        """Returns the full name and the path of a patch, see `find`."""
        files = self.files()
        given = name.replace("\\", "/")
        for asked in (given, given.removesuffix(_SUFFIX), _MARK.sub("", given)):
            for written in (str, str.casefold):
                alike = [n for n in files if _is_called(n, asked, written)]
                whole = [n for n in alike if written(n) == written(asked)]
                if len(alike) == 1 or len(whole) == 1:
                    chosen = (whole or alike)[0]
                    return chosen, files[chosen]
                if alike:
                    raise PatchError(
                        f"expected the name of one patch, found {name!r} for "
                        f"{', '.join(alike)}: give the subfolder too, in its own letters."
                    )
        shown = ", ".join(list(files)[:10]) or "nothing"
        raise PatchError(
            f"expected the name of a patch in the folder {self.root.name}, found {name!r}: put the "
            f"file there, or choose one of those in it ({shown})."
        )

    def _read(self, full: str, path: Path) -> Known:
        return Known(full, LoadedPatch(Patch.load(path), path), file_hash(path))

    def _record(self, path: Path) -> dict[str, Any] | PatchError:
        try:
            return self._told(path, lambda: inspect_file(path))
        except PatchError as error:
            return error

    def _fact(self, kind: str, path: Path, read: Callable[[Path], _Fact]) -> _Fact:
        """Returns what a function says of a file; it is asked again only when the file changed."""
        stamp = _stamp(path)
        known = self._facts.get((kind, path))
        if known is None or known[0] != stamp:
            known = self._facts[kind, path] = stamp, read(path)
        fact: _Fact = known[1]
        return fact

    def _told(self, path: Path, read: Callable[[], _Fact]) -> _Fact:
        """Reads a file; an error names its place in the folder, not on the computer.

        Raises:
            PatchError: as `read` does.
        """
        try:
            return read()
        except PatchError as error:
            short = printable_path(path.relative_to(self.root).as_posix())
            raise PatchError(str(error).replace(printable_path(path), short)) from error


def marked(name: str, mark: str) -> str:
    """Returns a name with a remark, as lists show it; `Folder` finds the patch by it too.

    >>> marked("deep/oil", "sdxl")
    'deep/oil [sdxl]'
    """
    return f"{name} [{mark}]"


def _stamp(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is replaced.

    Raises:
        PatchError: the file has gone, or cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise PatchError(
            f"expected the patch {path.name}, found that it cannot be read ({error.strerror}): "
            "refresh the list."
        ) from error
    return stat.st_mtime_ns, stat.st_size


def _inside(folder: str, path: str) -> str:
    return os.path.join(folder, os.path.basename(path))


def _is_called(known: str, asked: str, written: Callable[[str], str]) -> bool:
    """Tells whether a patch has this name, with or without its subfolder."""
    return written(asked) in (written(known), written(known.rsplit("/", 1)[-1]))
