"""Captions in files beside their images: photo.txt, photo.caption, photo.jpg.txt, photo.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dmp_common import PatchError
from dmp_common.errors import file_error
from dmp_common.patch.serialize import parse_json
from training.data.captions.texts import caption_lines, caption_value, captions_of, read_text
from training.data.sizes import Size

ENDINGS = (".txt", ".caption")
_JSON = ".json"

# The path of a file in whatever case its name is written, None where there is none.
Find = Callable[[Path], "Path | None"]


@dataclass(frozen=True)
class About:
    """What is known of an image besides its pixels.

    Args:
        captions: one of which is drawn; empty without any.
        bucket: the size it is trained at.
        file: of the caption, where it has one.
        lines: whether the captions are lines of a text file, of which only the first may count.
    """

    captions: tuple[str, ...] = ()
    bucket: Size | None = None
    file: Path | None = None
    lines: bool = False


@dataclass(frozen=True)
class CaptionSource:
    """Where captions are.

    Args:
        extension: of caption files; None looks for .txt, then .caption, then .json.
        column: of metadata.jsonl or metadata.csv; None looks for the usual names.
        metadata: kohya's JSON, which excludes the others.
        encoding: of text files without a byte order mark.
    """

    extension: str | None = None
    column: str | None = None
    metadata: Path | None = None
    encoding: str = "utf-8"


def caption_file(image: Path, source: CaptionSource, find: Find) -> About:
    """The captions in the file beside an image.

    Raises:
        PatchError: the file is not text, or not in the encoding of `source`.
    """
    extension = source.extension
    for ending in (*ENDINGS, _JSON) if extension is None else (dotted(extension),):
        # Both habits: a.txt and a.png.txt.
        for path in (image.with_suffix(ending), image.with_name(image.name + ending)):
            found = find(path)
            if found is None:
                continue
            if ending == _JSON:
                about = _from_json(found, source)
                if about.captions or extension is not None:
                    return about
            else:
                return About(caption_lines(read_text(found, source.encoding)), None, found, True)
    return About()


def _from_json(file: Path, source: CaptionSource) -> About:
    """The caption of {"caption": "..."}. Other tools write files of this name for other ends."""
    try:
        content = parse_json(read_text(file, source.encoding))
    except ValueError as error:
        if isinstance(error, PatchError):
            raise
        raise file_error(file, "JSON", error, "correct or remove the file") from error
    if not isinstance(content, dict):
        return About(file=file)
    value = caption_value(content, None, str(file))
    return About(captions_of(value, str(file)), None, file)


def dotted(extension: str) -> str:
    """An ending with its dot."""
    return extension if extension.startswith(".") else f".{extension}"
