"""Text from strangers, made safe to show."""

from __future__ import annotations

import pickle

import pytest

from dmp_common import PatchError
from dmp_common.errors import file_error, printable, unmarked

HOSTILE = {
    "colour": "\x1b[31mred",
    "title of the terminal": "\x1b]0;owned\x07",
    "line end": "a\r\nb",
    "line separator": "a\u2028b\u2029c\x85",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2067x\u2069",
    "invisible": "a\u200bb\ufeff",
    "NUL": "\x00",
    "half of a pair": "\ud83d",
    "long": "x" * 10_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_printable(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 200
    shown.encode("utf-8")
    assert str(PatchError(f"found {text}.")).replace("\n", "").isprintable()
    assert printable(text, 20) == printable(printable(text, 20), 20)


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("a b", "Größe 8 × 8", "パッチ", "C:\\x\\y", "emoji 🎨", ""):
        assert printable(text) == text
        assert str(PatchError(text)) == text
    assert str(PatchError("one\n  two")) == "one\n  two"
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 197 + "..."


def test_what_is_no_text() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert printable(3) == "3"
    assert printable([1, "a"]) == "[1, 'a']"
    assert printable(deep) == "a list that is too large to show"
    assert len(printable(10**5000)) <= 200


def test_unmarked_is_text_in_html_too() -> None:
    assert unmarked("<b onclick=1>&amp;") == "‹b onclick=1›＆amp;"


def test_errors_about_files() -> None:
    error = file_error("a\x1b.pt", "a patch", "\u202e", "choose another")
    assert str(error) == "a\\x1b.pt: expected a patch, found \\u202e: choose another."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, ValueError)
