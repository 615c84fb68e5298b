"""Text of captions, wherever it stands: encodings, lines, and the entries of metadata."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.errors import printable, printable_path
from dmp_common.patch.serialize import opened

COLUMNS = ("text", "caption", "captions", "prompt")  # of metadata, in the order of preference
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENDS = re.compile(r"\r\n|\n|\r")  # not U+2028 and the like, which `str.splitlines` splits at too


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    """The text of a file. A byte order mark counts more than `encoding`, and is left out.

    Raises:
        ValueError: the bytes are no text in this encoding.
    """
    for mark, marked in _MARKS:
        if data.startswith(mark):
            return data.decode(marked)
    # UTF-16 without a mark decodes as UTF-8: every second character is then NUL.
    if data.count(0) * 4 > len(data):
        raise ValueError("NUL bytes, as in UTF-16 without a byte order mark")
    return data.decode(encoding).replace("\0", " ")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file, with or without byte order mark.

    Raises:
        PatchError: it cannot be read, or is not in this encoding.
    """
    with opened(path, "a text file") as (file, _):
        data = file.read()
    try:
        return decoded(data, encoding)
    except ValueError as error:
        at = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PatchError(
            f"expected {encoding.upper()} text in {printable_path(path)}, found {at} that is not: "
            "save the file as UTF-8, or name its encoding with --caption_encoding, such as cp1252."
        ) from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, with the line ends of all systems and no others."""
    return _ENDS.split(text)


def caption_lines(text: str) -> tuple[str, ...]:
    """The captions of a text file: its lines that are not empty."""
    return tuple(line.strip() for line in lines_of(text) if line.strip())


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions of an entry of metadata: a text, a list of texts, or nothing.

    Raises:
        PatchError: something else.
    """
    values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    values = [entry for entry in values if entry is not None]
    if not all(isinstance(entry, str) for entry in values):
        raise PatchError(f"expected text as caption in {where}, found {printable(value)}.")
    return tuple(entry.strip() for entry in values if entry.strip())


def caption_value(
    row: Mapping[str, Any], column: str | None, where: str, names: Sequence[str] = COLUMNS
) -> Any:
    """The entry of a row that holds its caption, None without any.

    Raises:
        PatchError: the column that was asked for is not there.
    """
    if column is not None:
        if column not in row:
            found = printable(sorted(map(str, row)))
            raise PatchError(
                f"expected column {column} in {where}, found {found}: change --caption_column."
            )
        return row[column]
    return next((row[name] for name in names if row.get(name) is not None), None)
