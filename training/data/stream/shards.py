"""Webdataset shards: tar files in which files of one name, but for the ending, are one sample."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from dmp_common import PatchError
from dmp_common.errors import file_error, printable
from dmp_common.patch.serialize import opened, parse_json, write_atomically
from training.data.images import SYSTEM_FOLDERS, endings
from training.data.stream import remote

_META = r"__[^/]*__($|/)"  # webdataset's own files
_MAX_STATS = 1024**2
# What tarfile raises on damaged headers; a chain of long names is read by recursion.
_BROKEN = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Raw:
    """One sample as it lies in a shard: contents by ending."""

    key: str
    image: bytes
    parts: dict[str, bytes]


class Shard(NamedTuple):
    """One tar file: where it is, and a name that stays when all are moved elsewhere."""

    place: str
    name: str


def find_shards(text: str) -> list[Shard]:
    """All shards of `--webdataset`, in order.

    Raises:
        PatchError: as `expand`.
    """
    places = expand(text)
    parts = [place.split("/") for place in places]
    # Random draws are keyed by the name, so it says no more of where the data are than it has to.
    for depth in itertools.count(1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [Shard(*pair) for pair in zip(places, names, strict=True)]


def expand(text: str) -> list[str]:
    """Paths or URLs of all shards: `a/{000..123}.tar`, `a/*.tar`, a folder; several joined by ::.

    Raises:
        PatchError: nothing there, or a scheme that would run a program.
    """
    braceexpand = _webdataset()[0]
    found: list[str] = []
    for pattern in text.split("::"):
        if pattern.startswith("pipe:"):
            raise PatchError(
                f"expected paths or URLs of shards, found {pattern}: a data set does not run "
                "programs here; give the URL itself."
            )
        for place in braceexpand(pattern.replace("\\", "/"), escape=False):
            if place.startswith("file://"):
                place = url2pathname(urlparse(place).path)
            if remote.is_url(place):
                found.append(place)
                continue
            matches = sorted(glob.glob(f"{place}/*.tar" if Path(place).is_dir() else place))
            if not matches:
                raise PatchError(f"expected a shard at {place}, found none: check --webdataset.")
            found += [Path(match).as_posix() for match in matches]
    if len(set(found)) < len(found):
        twice = next(place for place, count in Counter(found).items() if count > 1)
        raise PatchError(f"expected each shard once, found {twice} twice in --webdataset.")
    return found


def read_shard(place: str) -> Iterator[Raw]:
    """The samples of a shard that have an image, in order, one at a time.

    Raises:
        PatchError: not a tar file, cut short, or unreachable.
    """
    _, group = _webdataset()
    with closing(remote.open_place(place)) as file:
        try:
            for sample in group(_entries(file, place)):
                parts = {e: v for e, v in sample.items() if not e.startswith("__")}
                for image in images_of(parts):
                    yield _raw(sample["__key__"], image, parts)
        except PatchError:
            raise
        except _BROKEN as error:
            raise _no_tar(place, error) from error


def images_of(parts: Iterable[str]) -> list[str]:
    """Which files of a sample, named by what follows the first dot, are images to train on.

    One, such as `png` of `a.png` and `a.txt`; other images such as `a.seg.png` then belong to it.
    Where there is none but names have more dots, as `photo.v2.png` and `photo.v2.txt`, each of
    these is an image of its own.
    """
    known = {ending.removeprefix(".") for ending in endings()}
    plain = next((part for part in parts if part in known), None)
    if plain is not None:
        return [plain]
    return [part for part in parts if part.rpartition(".")[2] in known]


def _raw(key: str, image: str, parts: dict[str, bytes]) -> Raw:
    """One image of a sample with the files that have its name."""
    prefix = image.rpartition(".")[0]
    start = f"{prefix}." if prefix else ""
    own = {part.removeprefix(start): data for part, data in parts.items()
           if part.startswith(start) and part != image}  # fmt: skip
    return Raw(f"{key}.{prefix}" if prefix else key, parts[image], own)


def _entries(file: BinaryIO, place: str) -> Iterator[dict[str, Any]]:
    """The files in a shard with their contents, one at a time.

    Only what is plainly in the shard is read: a compressed one, or a file with holes, can unpack
    to a thousand times its length.
    """
    with tarfile.open(fileobj=file, mode="r|") as tar:  # "r|*" would unpack
        for entry in tar:
            vars(tar)["members"] = []  # where tarfile would keep every header
            if not entry.isreg() or _is_hidden(entry.name):
                continue
            if entry.issparse():
                raise tarfile.ReadError(f"a file with holes ({printable(entry.name)})")
            content = tar.extractfile(entry)
            assert content is not None, "it is a regular file"
            yield {"fname": entry.name, "data": content.read(), "__url__": place}


def _is_hidden(name: str) -> bool:
    """Files of webdataset itself, of systems and of file managers, as in folders."""
    parts = name.removeprefix("./").split("/")
    return bool(re.match(_META, name)) or any(
        part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in parts
    )


def _no_tar(place: str, error: Exception) -> PatchError:
    return file_error(
        place,
        "a whole tar file that is not compressed",
        f"{type(error).__name__}: {error}",
        "fetch it again, unpack it if it is compressed, or leave it out of --webdataset",
    )


class Counts:
    """How many samples shards have, which a resumed run needs to find its place.

    Counted from the headers of a local shard; of a remote one known from img2dataset's
    `_stats.json` beside it, from `folder` where an earlier pass left it, or else by reading it.

    Args:
        folder: where counts of remote shards are kept; None keeps none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, int] = {}
        self.bare: dict[str, int] = {}  # samples without an image, of local shards

    def of(self, place: str) -> int:
        """Samples with an image in a shard.

        Raises:
            PatchError: the shard cannot be read.
        """
        if place not in self._known:
            self._known[place] = self._find(place)
        return self._known[place]

    def remember(self, place: str, count: int) -> None:
        """Keeps the count of a shard that was read to its end."""
        new = place not in self._known
        self._known[place] = count
        if new and self._folder is not None and remote.is_url(place):
            content = json.dumps({"shard": place, "samples": count})
            write_atomically(self._file(place), content.encode())

    def _find(self, place: str) -> int:
        if not remote.is_url(place):
            images, self.bare[place] = _count_headers(place)
            return images
        if self._folder is not None and self._file(place).is_file():
            return int(json.loads(self._file(place).read_text(encoding="utf-8"))["samples"])
        stats = _img2dataset_stats(place)
        if stats is not None:
            return stats
        count = sum(1 for _ in read_shard(place))
        self.remember(place, count)
        return count

    def _file(self, place: str) -> Path:
        assert self._folder is not None
        name = hashlib.sha256(place.encode()).hexdigest()[:32]
        return self._folder / "shards" / f"{name}.json"


def _count_headers(place: str) -> tuple[int, int]:
    """Images of a local shard, and samples without one, from its headers alone.

    Groups as `read_shard` does, by runs of one name.
    """
    base_and_ending = _webdataset_keys()
    try:
        with (
            opened(Path(place), "a shard") as (file, _),
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            names = (base_and_ending(entry.name) for entry in tar
                     if entry.isreg() and not _is_hidden(entry.name))  # fmt: skip
            groups = itertools.groupby((n for n in names if n[0] is not None), lambda n: n[0])
            counts = [len(images_of([e.lower() for _, e in group])) for _, group in groups]
            return sum(counts), counts.count(0)
    except PatchError:
        raise
    except _BROKEN as error:
        raise _no_tar(place, error) from error


def _img2dataset_stats(place: str) -> int | None:
    try:
        with closing(remote.open_place(place.removesuffix(".tar") + "_stats.json")) as file:
            stats = parse_json(file.read(_MAX_STATS))
    except ValueError:  # a PatchError is one
        return None  # not every shard is img2dataset's
    count = stats.get("successes") if isinstance(stats, dict) else None
    return count if type(count) is int and count >= 0 else None


def _webdataset() -> tuple[Any, Any]:
    try:
        from braceexpand import braceexpand
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise PatchError(
            "expected webdataset for --webdataset, found it is not installed: run pip install "
            "webdataset."
        ) from error
    return braceexpand, group_by_keys


def _webdataset_keys() -> Any:
    from webdataset.tariterators import base_plus_ext

    return base_plus_ext
