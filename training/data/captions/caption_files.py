"""Captions beside images: text files, Hugging Face's metadata files, kohya's JSON."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.errors import file_error, printable, printable_path
from dmp_common.patch.serialize import opened, parse_json
from training.data.sizes import Size

ENDINGS = (".txt", ".caption")
COLUMNS = ("text", "caption", "captions", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class About:
    """What metadata says of an image."""

    captions: tuple[str, ...]
    bucket: Size | None = None


@dataclass(frozen=True)
class CaptionSource:
    """Where captions are.

    Args:
        extension: of caption files; None looks for .txt, then for .caption.
        column: of metadata.jsonl or metadata.csv; None looks for the usual names.
        metadata: kohya's JSON, which excludes the others.
    """

    extension: str | None = None
    column: str | None = None
    metadata: Path | None = None


def read_text(path: Path) -> str:
    """A text file, with or without byte order mark.

    Raises:
        PatchError: it is not UTF-8.
    """
    try:
        with opened(path, "a text file") as (file, _):
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PatchError(
            f"expected UTF-8 text in {path}, found byte {error.start} that is not: save the file "
            "as UTF-8."
        ) from error


def caption_file(image: Path, extension: str | None) -> tuple[str, ...] | None:
    """The lines of the caption file of an image, None without a file (see `CaptionSource`)."""
    endings = ENDINGS if extension is None else (_dotted(extension),)
    for ending in endings:
        # Both habits: a.txt and a.png.txt.
        for path in (image.with_suffix(ending), image.with_name(image.name + ending)):
            if path.is_file():
                return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    return None


def folder_metadata(folder: Path, column: str | None) -> dict[Path, About] | None:
    """What metadata.jsonl or metadata.csv say of the images of a folder; None without them.

    Raises:
        PatchError: a line that is not understood, or an image that is not there.
    """
    files = [folder / name for name in METADATA if (folder / name).is_file()]
    if not files:
        return None
    found: dict[Path, About] = {}
    for file in files:
        for number, row in _rows(file):
            where = f"{file}, line {number}"
            name = row.get("file_name")
            if not isinstance(name, str):
                found_keys = printable(sorted(map(str, row)))
                raise PatchError(f"expected a file_name in {where}, found {found_keys}: add it.")
            image = folder / name.replace("\\", "/")
            if not os.path.isfile(image):  # unlike `Path`, also where a name is too long to be one
                raise PatchError(
                    f"expected the image {printable_path(image)} of {where}, found no such file."
                )
            found[image] = About(_captions(_caption_value(row, column, where), where))
    return found


def kohya_json(file: Path, images: list[Path], folder: Path) -> dict[Path, About]:
    """What kohya's metadata says: {image: {caption, tags, train_resolution}}.

    An image is named by its path, absolute or from `folder`, with or without ending.

    Raises:
        PatchError: another structure, or an image that is not there.
    """
    if not file.is_file():
        raise PatchError(f"expected kohya's metadata at {file}, found no such file.")
    try:
        content = parse_json(read_text(file))
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(file, "JSON", error, "correct the file") from error
    if not isinstance(content, dict):
        raise PatchError(
            f"expected {{image: {{caption, tags}}}} in {file}, found a {type(content).__name__}."
        )
    by_name: dict[str, Path] = {}
    for image in images:
        for name in (image, image.relative_to(folder)):
            by_name.setdefault(name.with_suffix("").as_posix(), image)
            by_name[name.as_posix()] = image
    found: dict[Path, About] = {}
    for name, entry in content.items():
        where = f"{file}, entry {printable(repr(name))}"
        known = by_name.get(name.replace("\\", "/"))
        if known is None:
            raise PatchError(f"expected an image in {folder} for {where}, found none.")
        if isinstance(entry, str):
            entry = {"caption": entry}
        if not isinstance(entry, dict):
            raise PatchError(f"expected {{caption, tags}} in {where}, found {printable(entry)}.")
        found[known] = _about(entry, where)
    return found


def _about(entry: Mapping[str, Any], where: str) -> About:
    """Kohya joins caption and tags."""
    captions, tags = _captions(entry.get("caption"), where), entry.get("tags")
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


def _caption_value(row: Mapping[str, Any], column: str | None, where: str) -> Any:
    if column is not None:
        if column not in row:
            found = printable(sorted(map(str, row)))
            raise PatchError(
                f"expected column {column} in {where}, found {found}: change --caption_column."
            )
        return row[column]
    return next((row[name] for name in COLUMNS if name in row), None)


def _captions(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(entry, str) for entry in values):
        raise PatchError(f"expected text as caption in {where}, found {printable(value)}.")
    return tuple(entry.strip() for entry in values if entry.strip())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(file)
    if file.suffix == ".csv":
        try:
            yield from enumerate(csv.DictReader(text.splitlines()), 2)
        except csv.Error as error:
            raise file_error(file, "a table (CSV)", error, "correct the file") from error
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise file_error(file, f"JSON in line {number}", error, "correct the line") from error
        if not isinstance(row, dict):
            raise file_error(file, f"{{...}} in line {number}", row, "correct the line")
        yield number, row


def _dotted(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"
