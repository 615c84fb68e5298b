"""The table of families and places is made from the code."""

from __future__ import annotations

import pytest

from benchmarks.support import PAGE, TITLES, updated
from dmp_common.bases.table import TABLE


def test_the_page_has_the_table_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text) == text, "run python -m benchmarks.support"
    with pytest.raises(ValueError, match="expected the marks"):
        updated("a page")


def test_every_base_is_in_the_table_once() -> None:
    named = [name for names in TITLES.values() for name in names]
    assert sorted(named) == sorted(row.name for row in TABLE)
