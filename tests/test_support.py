"""The table of families and places is made from the code."""

from __future__ import annotations

import pytest

from benchmarks.support import IN_SMALL, PAGE, TITLES, updated
from dmp_common import PatchError, get_base
from dmp_common.bases.table import TABLE
from tests.a1111_dmp.forge_classes import CLASSES
from training.base.families.family import Family
from training.base.families.table import family_of
from training.options import model_options


def test_the_page_has_the_table_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text) == text, "run python -m benchmarks.support"
    with pytest.raises(ValueError, match="expected the marks"):
        updated("a page")


def test_the_options_name_every_base_of_the_trainer() -> None:
    """The sizes of DiT are named by examples; the bases of CIFAR-10 are for a study."""
    for row in TABLE:
        if row.name.startswith(("dit-", "cifar10")):
            continue
        try:
            family_of(get_base(row.name))
        except PatchError:
            assert f" {row.name}," not in f" {model_options.BASES},"
        else:
            assert f" {row.name}," in f" {model_options.BASES},"


def test_the_lowest_diffusers_is_that_of_the_packaging() -> None:
    packaging = (PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"diffusers>={Family.since}"' in packaging


def test_every_base_is_in_the_table_once() -> None:
    named = [name for names in TITLES.values() for name in names]
    assert sorted(named) == sorted(row.name for row in TABLE)


def test_the_families_in_small_are_those_of_the_tests() -> None:
    assert sorted(IN_SMALL["Forge Neo"]) == sorted(base for *_, base in CLASSES.values())
