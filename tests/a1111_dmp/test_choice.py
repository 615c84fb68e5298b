"""What users choose, by name and number, and what an infotext keeps of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from a1111_dmp.choice import (
    DEFAULTS,
    FIELDS,
    Choice,
    from_controls,
    from_prompt,
    is_on,
    omitted,
)
from a1111_dmp.files import Folder
from a1111_dmp.infotext import from_infotext, to_infotext
from dmp_common import PatchError
from dmp_common.patch.file import file_hash
from tests.tiny import FAMILIES

TINY = FAMILIES["sd15"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("DMP")
    TINY.patch(1).save(root / "ink.safetensors")
    TINY.patch(2).save(root / "deep" / "oil.safetensors")
    TINY.patch(3).save(root / "other" / "oil.safetensors")
    (root / "notes.txt").write_text("no patch", encoding="utf-8")
    (root / ".hidden.safetensors").write_text("no patch", encoding="utf-8")
    return root


@pytest.fixture
def folder(root: Path) -> Folder:
    return Folder(root)


def test_names_are_paths_without_ending(folder):
    assert folder.names() == ["deep/oil", "ink", "other/oil"]
    assert Folder(folder.root / "nowhere").names() == []


@pytest.mark.parametrize("name", ["deep/oil", "deep/oil.safetensors", "deep\\oil"])
def test_finding(folder, name):
    assert folder.find(name) == folder.root / "deep" / "oil.safetensors"


@pytest.mark.parametrize(
    "name", ["../DMP/ink", "/etc/passwd", "./ink", "deep/../ink", "", ".hidden", "notes.txt"]
)
def test_nothing_else_is_found(folder, name):
    with pytest.raises(
        PatchError, match="expected the name of a patch in the folder DMP.*: put the"
    ):
        folder.find(name)


def test_a_name_alone_must_be_clear(folder):
    assert folder.full_name("ink.safetensors") == "ink"
    with pytest.raises(PatchError, match="found 'oil' for deep/oil, other/oil: give the subfolder"):
        folder.find("oil")
    with pytest.raises(PatchError, match=r"choose one of those in it \(nothing\)"):
        Folder(folder.root / "nowhere").find("ink")


def test_capital_letters_matter_only_where_two_names_differ_by_them(folder, tmp_path):
    assert (folder.full_name("INK"), folder.full_name("Other/OIL")) == ("ink", "other/oil")
    for name in ("a/Pen", "b/pen"):
        TINY.patch(1).save(tmp_path / f"{name}.safetensors")
    assert Folder(tmp_path).full_name("pen") == "b/pen"
    with pytest.raises(PatchError, match="found 'PEN' for a/Pen, b/pen"):
        Folder(tmp_path).find("PEN")


def test_a_name_that_ends_in_the_ending(tmp_path):
    TINY.patch(1).save(tmp_path / "x.safetensors.safetensors")
    folder = Folder(tmp_path)
    assert folder.names() == ["x.safetensors"]
    for name in ("x.safetensors", "x.safetensors.safetensors"):
        assert folder.load(name).name == "x.safetensors"


def test_links_to_folders_count_once(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("links need rights on this system")
    root = tmp_path / "DMP"
    TINY.patch(1).save(root / "real" / "p.safetensors")
    TINY.patch(1).save(tmp_path / "away" / "q.safetensors")
    for place in ("again", "real/around", "real/self"):
        (root / place).symlink_to(root if place != "again" else root / "real", True)
    (root / "far").symlink_to(tmp_path / "away", True)
    (tmp_path / "away" / "back").symlink_to(tmp_path, True)
    assert Folder(root).names() == ["far/q", "real/p"]


def test_errors_do_not_say_where_the_folder_is(root, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((root / "ink.safetensors").read_bytes()[:-9])
    folder = Folder(tmp_path)
    for call in (folder.load, folder.find, lambda name: folder.described(folder.find(name))):
        with pytest.raises(PatchError) as raised:
            call("missing" if call == folder.find else "cut")
        assert str(tmp_path.parent) not in str(raised.value)
    with pytest.raises(PatchError, match="found that it cannot be read"):
        folder.described(tmp_path / "gone.safetensors")


def test_pipes_and_links_to_nothing_are_no_patches(tmp_path):
    TINY.patch(1).save(tmp_path / "p.safetensors")
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nothing")
    folder = Folder(tmp_path)
    assert folder.names() == ["p"]
    assert folder.by_hash("renamed", file_hash(tmp_path / "p.safetensors")) == "p"
    with pytest.raises(PatchError, match="choose one of those"):
        folder.load("pipe")


def test_files_are_read_once_and_again_when_replaced(folder, tmp_path):
    assert folder.load("ink").loaded is folder.load("ink.safetensors").loaded
    other = Folder(tmp_path)
    TINY.patch(1).save(tmp_path / "p.safetensors")
    first = other.load("p")
    TINY.patch(1, sites="all").save(tmp_path / "p.safetensors")
    second = other.load("p")
    assert second.loaded is not first.loaded
    assert second.hash == file_hash(tmp_path / "p.safetensors") != first.hash


def test_loaded_patches_are_forgotten_in_the_end(tmp_path):
    folder = Folder(tmp_path)
    for index in range(9):
        TINY.patch(index).save(tmp_path / f"{index}.safetensors")
        folder.load(str(index))
    assert len(folder._loaded) == 6


def test_patches_are_loaded_outside_of_inference_mode(root):
    import torch

    with torch.inference_mode():
        patch = Folder(root).load("ink").loaded.patch
    assert not any(p.is_inference() for p in patch.parameters())


def values(*first: object) -> list[object]:
    return [*first, *DEFAULTS[len(first) :]]


def test_controls(folder):
    slots = from_controls(values("ink", 0.5, 0.1, 0.9, 1.0, 0.5, 0.0, "deep/oil"))
    assert slots[0] == Choice("ink", 0.5, 0.1, 0.9, 1.0, 0.5, 0.0)
    assert slots[1] == Choice("deep/oil")
    assert slots[2].empty
    record, known = slots[0].record(folder)
    assert (record.strength, record.start, record.end) == (0.5, 0.1, 0.9)
    assert record.curve == (1.0, 0.5, 0.0)
    assert known.name == "ink"


@pytest.mark.parametrize("nothing", [None, "", "None", "none"])
def test_no_patch(nothing):
    assert all(slot.empty for slot in from_controls(values(nothing)))


@pytest.mark.parametrize("wrong", ["much", None, True, [1], float("nan"), "inf"])
def test_numbers_must_be_numbers(wrong):
    with pytest.raises(PatchError, match="expected a number for start, found"):
        from_controls(values("ink", 1.0, wrong))


def test_keyframes_and_strengths_of_single_sites(folder):
    """They are read as in ComfyUI, and those of all slots come last, so that old requests hold."""
    found = from_controls([*DEFAULTS[:21], "0: 1, 0.5: 0.3", "MID: 0.5", "", "", " 1: 0 ", None])
    assert (found[0].keyframes, found[0].site_strengths) == ("0: 1, 0.5: 0.3", "MID: 0.5")
    assert (found[2].keyframes, found[2].site_strengths) == ("1: 0", "")
    record, _ = replace(found[0], patch="ink").record(folder)
    assert record.keyframes == ((0.0, 1.0), (0.5, 0.3))
    assert record.site_strengths == (("mid", 0.5),)
    with pytest.raises(PatchError, match="expected a text such as 0: 1.* for keyframes, found 1"):
        from_controls([*DEFAULTS[:21], 1, *DEFAULTS[22:]])
    for wrong, says in (
        ({"keyframes": "2: 1"}, "ink.safetensors: expected keyframes such as"),
        ({"site_strengths": "out.99: 1"}, "ink.safetensors: expected sites of this patch"),
        ({"keyframes": "0: 1", "late": 0.5}, "expected either keyframes or the factors"),
    ):
        with pytest.raises(PatchError, match=says):
            Choice.named({"patch": "ink", **wrong}).record(folder)


def test_objects_of_a_request():
    first, second = {"patch": "ink", "end": 0.9, "keyframes": "0: 1"}, {"patch": "deep/oil"}
    found = from_controls(values(first, second))
    assert found == [Choice("ink", end=0.9, keyframes="0: 1"), Choice("deep/oil"), Choice()]
    with pytest.raises(PatchError, match="found power: correct the request"):
        from_controls(values({"patch": "ink", "power": 1}))
    for wrong in (values({"patch": "ink"}, 0.8), [first] * 4 + list(DEFAULTS[4:])):
        with pytest.raises(PatchError, match="expected one to 3 objects for DMP and nothing after"):
            from_controls(wrong)


def test_other_kinds_of_values():
    assert from_controls(values("ink", "0.5", 0))[0] == Choice("ink", 0.5)
    with pytest.raises(PatchError, match="expected the name of a patch, found 3"):
        from_controls(values(3))
    assert is_on(True) and not is_on(False)
    for wrong in ("true", 1, None, "ink"):
        with pytest.raises(PatchError, match="expected true or false to enable DMP, found"):
            is_on(wrong)


def test_axes_change_any_slot():
    slots = from_controls(values("ink", 0.5), {(0, "strength"): 2.0, (0, "end"): 0.7})
    assert slots[0] == Choice("ink", 2.0, end=0.7)
    assert from_controls(values(), {(1, "patch"): "deep/oil"})[1].patch == "deep/oil"
    assert from_controls(values("ink"), {(0, "patch"): "None", (0, "late"): 1.0})[0].empty
    with pytest.raises(
        PatchError, match=r"the axis \[DMP\] Strength 2, found none: .* Patch 2, or"
    ):
        from_controls(values("ink"), {(0, "end"): 0.5, (1, "strength"): 2.0})


@pytest.mark.parametrize(
    ("written", "choice"),
    [
        ("ink", Choice("ink")),
        ("ink:0.8", Choice("ink", 0.8)),
        ("deep/oil : -1 ", Choice("deep/oil", -1.0)),
        ("a=b:strength = 2", Choice("a=b", 2.0)),
        ("ink:1:start=0.2:late=0", Choice("ink", 1.0, start=0.2, late=0.0)),
        (
            "ink:keyframes=0: 1, 0.5: 0.3:end=0.9:site_strengths=in.1-3: 0.5, out.*:0",
            Choice(
                "ink",
                end=0.9,
                keyframes="0: 1, 0.5: 0.3",
                site_strengths="in.1-3: 0.5, out.*:0",
            ),
        ),
    ],
)
def test_prompts(written, choice):
    assert from_prompt(written.split(":")) == choice


@pytest.mark.parametrize(
    "written",
    *[["", "ink:1:2", "ink:te=1", "ink:1:strength=2", "ink:end=1:end=1", "ink:x", "ink:end=late"]],
)
def test_wrong_prompts(written):
    with pytest.raises(PatchError, match="expected (<dmp:name:strength>|a number)"):
        from_prompt(written.split(":"))


def test_omitted_values():
    other = ["values", "of", "the", "next", "script"]
    host_list = ["ink", 0.5, *other, *DEFAULTS]
    assert omitted(host_list[: len(DEFAULTS)], 50 - 25, 50) == values("ink", 0.5)
    assert omitted(DEFAULTS, 50, 50) == list(DEFAULTS)
    assert omitted(other, 50 - len(DEFAULTS), 50) == list(DEFAULTS)
    with pytest.raises(PatchError, match="expected at most 27 values for DMP, found 28"):
        omitted(DEFAULTS, 51, 50)


def test_infotext_and_back(folder):
    for slot, choice in enumerate(
        [
            Choice("ink", 0.8, keyframes="0: 1, 1: 0", site_strengths="mid: 0.5"),
            Choice("deep/oil", 1.0, 0.1, 0.9, 1.0, 0.5, 0.0),
        ]
    ):
        _, known = choice.record(folder)
        texts = {k: str(v) for k, v in to_infotext("DMP", slot, choice, known).items()}
        assert (slot == 0) == ("DMP strength" in texts)
        back = [from_infotext(texts, "DMP", slot, name, folder) for name in FIELDS]
        assert Choice.of(back) == choice
    assert Choice.of([from_infotext({}, "DMP", 2, name, folder) for name in FIELDS]) == Choice()


def test_renamed_files_are_known_by_their_hash(folder):
    texts = {"DMP patch": "gone", "DMP hash": file_hash(folder.root / "deep" / "oil.safetensors")}
    assert from_infotext(texts, "DMP", 0, "patch", folder) == "deep/oil"
    assert folder.by_hash("gone", "0123456789") == "gone"
    assert folder.by_hash("gone", None) == "gone"
    assert folder.by_hash("ink", texts["DMP hash"]) == "ink"
