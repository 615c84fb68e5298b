"""Lists the images of a folder: each real file once, and nothing left out without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dmp_common import PatchError
from dmp_common.errors import printable_path
from training.data.images import SYSTEM_FOLDERS, VIDEOS, how_to_read, is_image
from training.data.skips import Skips

CACHE = ".dmp_cache"  # hidden, so that it is never searched for images
# Files that belong to data sets or systems, of which nobody expects that they are trained.
_COMPANIONS = frozenset(
    {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".toml", ".yaml", ".yml",
     ".md", ".npz", ".npy", ".pt", ".safetensors", ".db", ".ini", ".log", ".html", ".py", ".sh",
     ".bat", ".lnk", ".url", ".tmp"}
)  # fmt: skip


@dataclass
class Listing:
    """The images of a folder, sorted by path, and the names of the files beside them.

    Args:
        folder: that was listed.
        images: in the order of their paths.
        names: of all files that are no images, by folder.
    """

    folder: Path
    images: list[Path] = field(default_factory=list)
    names: dict[Path, set[str]] = field(default_factory=dict)
    _lower: dict[Path, dict[str, str]] = field(default_factory=dict, repr=False)

    def find(self, path: Path) -> Path | None:
        """The file at a path, in whatever case its name is written; None without one."""
        names = self.names.get(path.parent, set())
        if path.name in names:
            return path
        if path.parent not in self._lower:
            self._lower[path.parent] = {name.lower(): name for name in sorted(names)}
        found = self._lower[path.parent].get(path.name.lower())
        return None if found is None else path.with_name(found)


def list_images(
    folder: Path, skips: Skips, *, recursive: bool = True, companions: frozenset[str] = frozenset()
) -> Listing:
    """All images of a folder and, if asked for, of the folders below it.

    Links are followed, but each real file is listed once. Hidden folders and those of file
    managers are left out.

    Args:
        skips: counts what is left out.
        companions: endings of files that belong to the images, besides the usual ones.

    Raises:
        PatchError: no such folder.
    """
    if not folder.is_dir():
        raise PatchError(f"expected a folder of images at {folder}, found none: check the path.")
    walk = _Walk(Listing(folder), skips, recursive, companions | _COMPANIONS)
    walk.run()
    walk.listing.images.sort(key=Path.as_posix)  # the same on every system
    return walk.listing


class _Walk:
    def __init__(
        self, listing: Listing, skips: Skips, recursive: bool, companions: frozenset[str]
    ) -> None:
        self.listing, self._skips, self._recursive = listing, skips, recursive
        self._companions = companions
        self._seen: set[str] = set()  # real paths of folders
        self._folder_links: list[Path] = []
        self._file_links: list[Path] = []

    def run(self) -> None:
        """Real folders come first, so that an image has its own path rather than that of a link."""
        waiting = [self.listing.folder]
        while waiting:
            self._folder(waiting.pop(), waiting)
            if not waiting and self._folder_links:
                links, self._folder_links = sorted(self._folder_links, reverse=True), []
                waiting = links
        self._links_to_files()

    def _folder(self, folder: Path, waiting: list[Path]) -> None:
        real = os.path.realpath(folder)
        if real in self._seen:
            self._skips.add("links to folders that are searched already", [self._name(folder)])
            return
        self._seen.add(real)
        others = self.listing.names.setdefault(folder, set())
        for entry in self._entries(folder):
            path = folder / entry.name
            link = entry.is_symlink()
            if entry.is_dir():
                self._found_folder(path, link, waiting)
            elif not entry.is_file():
                if is_image(path) or link:
                    self._not_regular(path, link)
            elif not is_image(path):
                others.add(entry.name)
                self._other(path)
            elif link:
                self._file_links.append(path)
            else:
                self.listing.images.append(path)

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            name = f"{self._name(folder)}: {error.strerror}"
            self._skips.add("folders that cannot be read", [name])

    def _found_folder(self, path: Path, link: bool, waiting: list[Path]) -> None:
        if path.name == CACHE or not self._recursive:
            return
        if path.name.startswith(".") or path.name.lower() in SYSTEM_FOLDERS:
            self._skips.add("hidden or system folders", [self._name(path)])
        elif link:
            self._folder_links.append(path)
        else:
            waiting.append(path)

    def _not_regular(self, path: Path, link: bool) -> None:
        if path.name.startswith("."):
            return
        dangling = link and not path.exists()
        reason = "links that lead nowhere" if dangling else "pipes, sockets or devices"
        self._skips.add(reason, [self._name(path)])

    def _other(self, path: Path) -> None:
        """A file that is neither an image nor something that belongs to a data set."""
        ending = path.suffix.lower()
        if path.name.startswith(".") or ending in self._companions:
            return
        remedy = how_to_read(ending)
        if ending in VIDEOS:
            remedy = "make animations of them (docs/TRAINING.md, Videos)"
            self._skips.add(f"{ending} videos, which are not read: {remedy}", [self._name(path)])
        elif remedy is not None:
            self._skips.add(f"{ending} images: {remedy} to read them", [self._name(path)])
        else:
            self._skips.add("files that are no images", [self._name(path)])

    def _links_to_files(self) -> None:
        """Links to images that are not listed already, each target once."""
        targets: set[str] = set()
        twice = []
        for path in sorted(self._file_links):
            target = os.path.realpath(path)
            listed = os.path.dirname(target) in self._seen and is_image(Path(target))
            if listed or target in targets:
                twice.append(self._name(path))
                continue
            targets.add(target)
            self.listing.images.append(path)
        self._skips.add("links to images that are there already", twice)

    def _name(self, path: Path) -> str:
        inside = path.relative_to(self.listing.folder).as_posix()
        return printable_path(inside if inside != "." else path.as_posix())
