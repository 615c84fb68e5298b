"""What users write about sites, strengths at sites and keyframes."""

from __future__ import annotations

import pytest

from dmp_common import Patch, PatchError
from dmp_common.tools.written import keyframes, places, site_strengths, sites_named
from tests.tiny import FAMILIES


@pytest.fixture(scope="module")
def patch() -> Patch:
    return Patch.create("sd15", sites="all")


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("in.1", ["in.1"]),  # not in.10 and in.11
        ("In.9-20", ["in.9", "in.10", "in.11"]),
        ("*.11", ["in.11", "out.11"]),
        ("*.10-11", ["in.10", "in.11", "out.10", "out.11"]),
        ("LAST", ["out.11"]),
        ("in.3-1", []),
        ("in", [f"in.{n}" for n in range(1, 12)]),
        ("i*n.1", ["in.1"]),
        ("", []),
        ("in[1]", []),
        ("in.", []),
    ],
)
def test_sites_named(patch, word, named):
    assert sites_named(patch, word) == named


def test_sites_below(patch):
    """A block's name stands for all outputs in it."""
    patch = FAMILIES["sd15"].patch(mix="modulate")
    below = sites_named(patch, "in.1")
    assert below
    assert all(name.startswith("in.1.") for name in below)
    assert set(sites_named(patch, "*.attn*.to_q")) == {n for n in patch.sites if "to_q" in n}


@pytest.mark.parametrize("mix", ["add", "modulate"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_places_name_sites(name, mix):
    """Every word is read, and the blocks name each site once."""
    patch = FAMILIES[name].patch(mix=mix)
    words = places(patch.variant)
    assert words[0] == "all"
    assert all(sites_named(patch, word) for word in words)
    blocks = [word for word in words[1:] if word[-1].isdigit() or word == "mid"]
    named = [site for block in blocks for site in sites_named(patch, block)]
    assert sorted(named) == sorted(patch.sites)


def test_the_later_entry_counts(patch):
    given = site_strengths(patch, "all: 0.5\nIN.*: 0; in.2-11: 1, out.1: 0.5,")
    assert dict(given) == {"in.1": 0.0, "mid": 0.5} | {f"out.{n}": 0.5 for n in range(12)}
    assert site_strengths(patch, " ") == ()


def test_all_wrong_entries_are_named(patch):
    with pytest.raises(PatchError) as told:
        site_strengths(patch, "in.1: much, nowhere: 1, mid, out.1: inf, in.2: 1")
    for part in ("'in.1: much'", "'nowhere'", "'mid'", "'out.1: inf'", "in.1, in.2"):
        assert part in str(told.value)
    with pytest.raises(PatchError, match=r"found '0.5', 'x: 1', '2: 1', '0: nan': correct"):
        keyframes("0.5, x: 1, 2: 1, 0: nan, 1: 0")


def test_keyframes_keep_their_order():
    assert keyframes("0.5: 1, 0.5: -0.25, 1: 0") == ((0.5, 1.0), (0.5, -0.25), (1.0, 0.0))
