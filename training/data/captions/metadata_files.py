"""Captions of many images in one file: Hugging Face's metadata files, and kohya's JSON."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dmp_common import PatchError
from dmp_common.errors import file_error, printable
from dmp_common.patch.serialize import parse_json
from training.data.captions.caption_files import About
from training.data.captions.texts import caption_value, captions_of, lines_of, read_text
from training.options.problems import ConfigError

METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass
class Described:
    """What a file of metadata says of the images of a folder.

    Args:
        about: by image.
        gone: names in the file that no image has.
        moved: how many names have another path, and were found by the end of it.
    """

    about: dict[Path, About] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    moved: int = 0


class ImageNames:
    """Finds images by the names that metadata have for them.

    Paths of Windows are understood. A path that is not known here, of another machine perhaps, is
    taken for the image with the longest common end.

    Args:
        images: all that there are.
        folder: names are relative to it.
        bare: whether the ending may be left out, as in kohya's files.
    """

    def __init__(self, images: Iterable[Path], folder: Path, bare: bool) -> None:
        self._bare = bare
        self._known: dict[str, Path] = {}
        for image in images:
            for path in (image, image.relative_to(folder)):
                self._known[path.as_posix()] = image
                if bare:
                    self._known.setdefault(path.with_suffix("").as_posix(), image)

    def find(self, name: str) -> tuple[Path | None, bool]:
        """The image of a name, None without any; and whether only the end of its path fits."""
        path = os.path.normpath(name.replace("\\", "/")).replace("\\", "/")
        if path in self._known:
            return self._known[path], False
        parts = PurePosixPath(path).parts
        # Kohya's names may be relative to the folder that a script was started in.
        if not (self._bare or path.startswith("/") or path[1:2] == ":"):
            return None, False
        for first in range(1, len(parts)):
            found = self._known.get("/".join(parts[first:]))
            if found is not None:
                return found, True
        return None, False


def folder_metadata(
    folder: Path, images: Iterable[Path], column: str | None, encoding: str = "utf-8"
) -> Described | None:
    """What metadata.jsonl or metadata.csv in a folder say of its images; None without them.

    Raises:
        PatchError: lines that are not understood; all of them are named.
    """
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if not files:
        return None
    names, found, problems = ImageNames(images, folder, bare=False), Described(), []
    for file in files:
        for where, row in _rows(file, encoding):
            try:
                _add_row(row, where, column, names, found)
            except PatchError as error:
                problems.append(error)
    raise_all(problems)
    return found


def _add_row(
    row: Mapping[str, Any] | PatchError,
    where: str,
    column: str | None,
    names: ImageNames,
    found: Described,
) -> None:
    if isinstance(row, PatchError):
        raise row
    name = row.get("file_name")
    if not isinstance(name, str):
        keys = printable(sorted(map(str, row)))
        raise PatchError(f"expected a file_name in {where}, found {keys}: add it.")
    captions = captions_of(caption_value(row, column, where), where)
    _add(found, names, name, About(captions))


def _add(found: Described, names: ImageNames, name: str, about: About) -> None:
    image, moved = names.find(name)
    if image is None:
        found.gone.append(name)
        return
    found.moved += moved
    before = found.about.get(image)
    # A second row of an image adds a caption, as in files with one row for each caption.
    found.about[image] = about if before is None else replace(
        before, captions=before.captions + about.captions
    )  # fmt: skip


def kohya_json(
    file: Path, images: Iterable[Path], folder: Path, encoding: str = "utf-8"
) -> Described:
    """What kohya's metadata says: {image: {caption, tags, train_resolution}}.

    An image is named by its path, absolute or from `folder`, with or without ending.

    Raises:
        PatchError: another structure; all entries that are not understood are named.
    """
    if not file.is_file():
        raise PatchError(f"expected kohya's metadata at {file}, found no such file.")
    try:
        content = parse_json(read_text(file, encoding))
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(file, "JSON", error, "correct the file") from error
    if not isinstance(content, dict):
        raise PatchError(
            f"expected {{image: {{caption, tags}}}} in {file}, found a {type(content).__name__}."
        )
    names, found, problems = ImageNames(images, folder, bare=True), Described(), []
    for name, entry in content.items():
        try:
            about = _kohya_about(entry, f"{file}, entry {printable(repr(name))}")
            _add(found, names, name, about)
        except PatchError as error:
            problems.append(error)
    raise_all(problems)
    if content and not found.about:
        raise PatchError(
            f"expected entries for the images in {folder} in {file}, found none of its "
            f"{len(content)} entries there, such as {printable(found.gone[0])}: check the path of "
            "the metadata and of the images."
        )
    return found


def _kohya_about(entry: Any, where: str) -> About:
    """Kohya joins caption and tags."""
    if isinstance(entry, str):
        entry = {"caption": entry}
    if not isinstance(entry, dict):
        raise PatchError(f"expected {{caption, tags}} in {where}, found {printable(entry)}.")
    captions, tags = captions_of(entry.get("caption"), where), entry.get("tags")
    if isinstance(tags, list):
        tags = ", ".join(map(str, tags))
    if tags:
        captions = tuple(f"{text}, {tags}" for text in captions) or (str(tags),)
    bucket = entry.get("train_resolution")
    if bucket is None:
        return About(captions)
    if not (isinstance(bucket, list) and len(bucket) == 2 and all(type(n) is int for n in bucket)):
        raise PatchError(
            f"expected train_resolution [width, height] in {where}, found {printable(bucket)}."
        )
    return About(captions, (bucket[0], bucket[1]))


def _rows(file: Path, encoding: str) -> Iterator[tuple[str, Mapping[str, Any] | PatchError]]:
    """Where each row is, and the row or what is wrong with it."""
    text = read_text(file, encoding)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise file_error(file, "a table (CSV)", error, "correct the file") from error
        return
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            yield f"{file}, line {number}", _json_row(file, number, line)


def _json_row(file: Path, number: int, line: str) -> Mapping[str, Any] | PatchError:
    try:
        row = parse_json(line)
    except ValueError as error:
        return file_error(file, f"JSON in line {number}", error, "correct the line")
    if not isinstance(row, dict):
        return file_error(file, f"{{...}} in line {number}", row, "correct the line")
    return row


def raise_all(problems: list[PatchError]) -> None:
    """Raises:
    PatchError: there are problems, all of which it names.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(*map(str, problems))
