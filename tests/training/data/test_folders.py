"""Folders: captions beside images, kohya's repeats, classes, metadata."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, LABELS, NOTHING, epoch, keys, opened, picture
from training.data.kind import DataKind
from training.data.summary import CaptionCounts
from training.options.problems import ConfigError


def captions_of(folder: Path, **options: Any) -> dict[str, str]:
    """The caption of each image in the first epoch."""
    data = opened(CAPTIONS, train_data_dir=str(folder), **options)
    return {
        key: caption
        for batch in epoch(data, global_batch=1)
        for key, caption in zip(batch.keys, batch.captions or [], strict=True)
    }


def test_caption_files_of_both_endings_and_both_habits(tmp_path: Path) -> None:
    for name in "abcd":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("from txt\n", encoding="utf-8")
    (tmp_path / "a.caption").write_text("from caption", encoding="utf-8")
    (tmp_path / "b.caption").write_text("\ufeffmit Umlaut ü", encoding="utf-8")
    (tmp_path / "c.png.txt").write_text("double ending", encoding="utf-8")
    (tmp_path / "d.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    found = captions_of(tmp_path)
    assert found == {
        "a.png": "from txt", "b.png": "mit Umlaut ü", "c.png": "double ending", "d.png": "first",
    }  # fmt: skip
    data = opened(train_data_dir=str(tmp_path))
    assert any("several lines" in note and "d.txt" in note for note in data.summary().notes)
    drawn = {captions_of(tmp_path, enable_wildcard=True, seed=n)["d.png"] for n in range(20)}
    assert drawn == {"first", "second"}


def test_a_given_extension_alone_counts(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    (tmp_path / "000.tags").write_text("x", encoding="utf-8")
    assert captions_of(tmp_path, caption_extension="tags") == {"000.png": "x"}
    with pytest.raises(PatchError, match="found 1 of 1 without one"):
        captions_of(tmp_path, caption_extension=".caption")


def test_missing_captions_are_never_silent(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(PatchError, match=r"found 2 of 3 without one \(001.png, 002.png\)"):
        captions_of(tmp_path)
    assert captions_of(tmp_path, class_tokens="a dog")["001.png"] == "a dog"
    assert captions_of(tmp_path, allow_empty_captions=True)["002.png"] == ""
    summary = opened(train_data_dir=str(tmp_path), allow_empty_captions=True).summary()
    assert summary.captions == CaptionCounts(found=1, missing=1, empty=1)
    assert "captions: 1 images with, 1 missing, 1 empty" in summary.text(1)
    assert any("2 images are trained on the empty caption" in note for note in summary.notes)


def test_captions_that_are_not_utf8(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 3)
    for n in (0, 2):
        (tmp_path / f"{n:03d}.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        captions_of(tmp_path)
    assert len(caught.value.problems) == 2
    for name in ("000.txt", "002.txt", "--caption_encoding"):
        assert name in str(caught.value)
    assert captions_of(tmp_path, caption_encoding="cp1252")["000.png"] == "Käse"
    data = opened(train_data_dir=str(tmp_path), skip_broken=True)
    assert data.size == 1 and "2 images whose caption cannot" in data.summary().skipped[0].text
    with pytest.raises(ValueError, match="encoding that Python knows"):
        captions_of(tmp_path, caption_encoding="utf-99")


def test_repeat_folders(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "3_sks dog", 2, captions=False)
    making.folder_of(tmp_path / "1_cat", 2, start=5)
    making.folder_of(tmp_path / "0_off", 2, start=9)
    data = opened(train_data_dir=str(tmp_path))
    seen = Counter(keys(epoch(data, global_batch=1)))
    assert seen == {
        "3_sks dog/000.png": 3, "3_sks dog/001.png": 3, "1_cat/005.png": 1, "1_cat/006.png": 1,
    }  # fmt: skip
    found = captions_of(tmp_path)
    assert found["3_sks dog/000.png"] == "sks dog"
    assert found["1_cat/005.png"] == "one, two, number 5"
    text = data.summary().text(2)
    assert "3_sks dog: 2 images x 3" in text
    assert "2 images of folder 0_off, which has 0 repeats" in text
    assert "4 images" in text and "with repeats: 8" in text


def test_repeats_of_an_image_have_draws_of_their_own(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "40_x", 1)
    data = opened(train_data_dir=str(tmp_path), flip_aug=True)
    pictures = {b.pixels.numpy().tobytes() for b in epoch(data, global_batch=1)}
    assert len(pictures) == 2


def test_images_outside_of_repeat_folders_are_not_lost_silently(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "2_cat", 1)
    making.folder_of(tmp_path / "rest", 2)
    with pytest.raises(PatchError, match=r"found 2 elsewhere, such as .*rest"):
        opened(train_data_dir=str(tmp_path))
    (tmp_path / "rest").rename(tmp_path / ".rest")
    assert opened(train_data_dir=str(tmp_path)).size == 2


def test_class_folders(tmp_path: Path) -> None:
    for name in ("bee", "ant", "dog", "cow"):
        making.folder_of(tmp_path / name / "deep", 1, captions=False)
    data = opened(LABELS, train_data_dir=str(tmp_path))
    found = {
        key.split("/")[0]: int(label)
        for batch in epoch(data, global_batch=1)
        for key, label in zip(batch.keys, batch.labels, strict=True)
    }
    assert found == {"ant": 0, "bee": 1, "cow": 2, "dog": 3}
    assert data.summary().classes == {"ant": 1, "bee": 1, "cow": 1, "dog": 1}
    assert "classes: 4" in data.summary().text(1)


def test_some_of_a_bases_classes(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "images" / "dog", 1, captions=False)
    making.folder_of(tmp_path / "images" / "bee", 1, captions=False)
    with pytest.raises(PatchError, match="expected 4 classes, as the base has, found 2"):
        opened(LABELS, train_data_dir=str(tmp_path / "images"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncow\ndog\n", encoding="utf-8")
    data = opened(LABELS, train_data_dir=str(tmp_path / "images"), class_list=str(names))
    assert sorted(int(b.labels) for b in epoch(data, global_batch=1)) == [1, 3]
    names.write_text("ant\nbee\n", encoding="utf-8")
    with pytest.raises(PatchError, match="1 others in .* such as dog"):
        opened(LABELS, train_data_dir=str(tmp_path / "images"), class_list=str(names))


def test_folders_named_by_class_id(tmp_path: Path) -> None:
    for name in ("3", "1"):
        making.folder_of(tmp_path / name, 1, captions=False)
    data = opened(LABELS, train_data_dir=str(tmp_path))
    assert sorted(int(b.labels) for b in epoch(data, global_batch=1)) == [1, 3]
    making.folder_of(tmp_path / "4", 1, captions=False)
    with pytest.raises(PatchError, match="at most 4 classes, as the base has, found id 4"):
        opened(LABELS, train_data_dir=str(tmp_path))


def test_images_without_a_class(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "a", 1, captions=False)
    making.folder_of(tmp_path, 1, captions=False)
    with pytest.raises(PatchError, match="one folder for each class"):
        opened(LABELS, train_data_dir=str(tmp_path))


def test_unconditional_folders_need_nothing_else(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "a", 2, captions=False)
    making.folder_of(tmp_path / "b", 1, captions=False)
    data = opened(NOTHING, train_data_dir=str(tmp_path))
    batch = next(data.batches(global_batch=3))
    assert batch.captions is None and batch.labels is None and len(set(batch.keys)) == 3
    assert "captions" not in data.summary().text(1)


def test_numbered_folders_mean_nothing_without_captions(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "0_plane", 2, captions=False)
    making.folder_of(tmp_path / "3_cat", 1, captions=False)
    assert opened(NOTHING, train_data_dir=str(tmp_path)).size == 3


def test_grey_bases(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1, captions=False)
    kind = DataKind("none", channels=1, resolution=16, multiple=1)
    batch = next(opened(kind, train_data_dir=str(tmp_path)).batches(global_batch=1))
    assert batch.pixels.shape == (1, 1, 16, 16)


def test_kohyas_json(tmp_path: Path) -> None:
    images = making.folder_of(tmp_path / "images", 4, captions=False)
    content = {
        "000": {"caption": "a cat", "tags": "x, y"},
        str(images / "001.png"): {"tags": "only, tags"},
        "002.png": {"caption": "sized", "train_resolution": [64, 16]},
    }
    file = tmp_path / "meta.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    options = {"in_json": str(file), "enable_bucket": True}
    assert captions_of(images, **options) == {
        "000.png": "a cat, x, y", "001.png": "only, tags", "002.png": "sized",
    }  # fmt: skip
    data = opened(train_data_dir=str(images), **options)
    assert {(r.width, r.height) for r in data.summary().buckets} >= {(64, 16)}
    (line,) = data.summary().skipped
    assert line.count == 1 and "not in meta.json (003.png)" in line.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "found a list"),
        ("{", "expected JSON"),
        ('{"nothere": {"caption": "x"}}', "none of its 1 entries there, such as nothere"),
        ('{"000": {"caption": 3}}', "text as caption"),
        ('{"000": {"caption": "x", "train_resolution": [3, 5]}}', "multiples of 8"),
        ('{"000": {"caption": "x", "train_resolution": "big"}}', r"\[width, height\]"),
    ],
)
def test_bad_json(tmp_path: Path, content: str, message: str) -> None:
    images = making.folder_of(tmp_path / "images", 1)
    (tmp_path / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(PatchError, match=message):
        opened(train_data_dir=str(images), in_json=str(tmp_path / "meta.json"), enable_bucket=True)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_metadata_files_of_hugging_face(tmp_path: Path, ending: str) -> None:
    making.folder_of(tmp_path, 2, captions=False)
    rows = [{"file_name": f"{n:03d}.png", "text": f"row {n}", "other": f"x {n}"} for n in (0, 1)]
    lines = [json.dumps(row) for row in rows]
    if ending == "csv":
        lines = ["file_name,text,other", *(",".join(row.values()) for row in rows)]
    (tmp_path / f"metadata.{ending}").write_text("\n".join(lines), encoding="utf-8")
    assert captions_of(tmp_path) == {"000.png": "row 0", "001.png": "row 1"}
    assert captions_of(tmp_path, caption_column="other")["000.png"] == "x 0"
    with pytest.raises(PatchError, match="expected column nope"):
        captions_of(tmp_path, caption_column="nope")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "JSON in line 1, found Expecting"), ("3", r"expected \{...\}"), ("{}", "a file_name"),
     ('{"file_name": "x.png"}', "none that can be used: 1 entries of metadata"),
     ("3\n4", r"line 1.*\n.*line 2"), ('{"file_name": "000.png", "text": 3}', "text as caption")],
)  # fmt: skip
def test_bad_metadata(tmp_path: Path, line: str, message: str) -> None:
    making.folder_of(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(PatchError, match=message):
        opened(train_data_dir=str(tmp_path))


def test_broken_images_are_all_found_before_training(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.raises(PatchError, match=r"image in .*001\.png, found .*remove this file"):
        opened(train_data_dir=str(tmp_path), max_broken=0)
    for n in range(10, 17):
        (tmp_path / f"{n:03d}.jpg").write_bytes(b"broken")
        (tmp_path / f"{n:03d}.txt").write_text("x", encoding="utf-8")
    with pytest.raises(PatchError, match=r"at most 7 images .*, found 8") as caught:
        opened(train_data_dir=str(tmp_path), max_broken=7)
    assert all(f"{n:03d}.jpg" in str(caught.value) for n in range(10, 17))
    for options in ({"max_broken": 8}, {}, {"max_broken": 0, "skip_broken": True}):
        data = opened(train_data_dir=str(tmp_path), **options)
        assert data.size == 2
        (line,) = data.summary().skipped
        assert line.count == 8 and line.text.startswith("8 broken images (001.png")
        assert f"skipped: {line.text}" in data.summary().text(1)


def test_an_image_that_breaks_while_training_is_named(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    data = opened(train_data_dir=str(tmp_path))
    (tmp_path / "000.png").write_bytes(making.encoded(picture(1, (9, 9))))
    for workers in (0, 1):
        with pytest.raises(PatchError, match=r"^expected .*000\.png with 40 x 40.* found 9 x 9"):
            next(data.batches(global_batch=1, workers=workers))


@pytest.mark.parametrize("content", [None, "empty"])
def test_no_images(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "x"
    if content:
        folder.mkdir()
    with pytest.raises(PatchError, match="--train_data_dir" if content else "found none: check"):
        opened(train_data_dir=str(folder))


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    making.folder_of(tmp_path, 1)
    making.folder_of(tmp_path / ".hidden", 2)
    (tmp_path / "._000.png").write_bytes(b"mac")
    assert opened(train_data_dir=str(tmp_path)).size == 1


def test_the_summary_recommends_buckets(tmp_path: Path) -> None:
    for n in range(3):
        picture(n, (90, 30)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("x", encoding="utf-8")
    without = opened(train_data_dir=str(tmp_path)).summary()
    assert without.cropped > 0.6
    assert any("--enable_bucket" in note for note in without.notes)
    with_buckets = opened(train_data_dir=str(tmp_path), enable_bucket=True).summary()
    assert with_buckets.cropped < 0.3 and not with_buckets.notes
    assert "steps per epoch: 2 of batch 2 (1 images seen twice" in with_buckets.text(2)


def test_sdxls_sizes(tmp_path: Path) -> None:
    """Original height and width, crop of the resized image, target; mirrored with the image."""
    picture(1, (80, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    data = opened(train_data_dir=str(tmp_path), flip_aug=True, random_crop=True)
    rows = {}
    for n in range(40):
        batch = next(iter(epoch(data, n, global_batch=1)))
        rows[tuple(batch.sizes[0].tolist())] = batch.pixels
    assert {row[:3] + row[4:] for row in rows} == {(40, 80, 0, 32, 32)}
    assert len({row[3] for row in rows}) > 10 and {row[3] for row in rows} <= set(range(33))
