"""Kohya's dataset file: what it sets, what it inherits, what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import LABELS, epoch, keys, opened
from training.data.batch import Data


def read(folder: Path, text: str, **options: Any) -> Data:
    file = folder / "dataset.toml"
    file.write_text(text, encoding="utf-8")
    return opened(dataset_config=str(file), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    making.folder_of(tmp_path / "cats", 3)
    making.folder_of(tmp_path / "dogs", 2, captions=False, start=10)
    return tmp_path


FULL = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
caption_dropout_rate = 0

[[datasets]]
resolution = 32
batch_size = 4
min_bucket_reso = 16
bucket_reso_steps = 16
flip_aug = true

  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 2
  cache_info = false

  [[datasets.subsets]]
  image_dir = "dogs"
  class_tokens = "a dog"
  keep_tokens = 2
  is_reg = false
  flip_aug = false
"""


def test_values_are_inherited_and_overruled(folder: Path) -> None:
    data = read(folder, FULL, train_batch_size=4, caption_dropout_rate=0.9)
    seen = Counter(keys(epoch(data, global_batch=1)))
    assert Counter(seen.values()) == {2: 3, 1: 2}
    cat, dog = data.samples[0].subset, data.samples[-1].subset
    assert (cat.name, cat.repeats, dog.name, dog.repeats) == ("cats", 2, "dogs", 1)
    assert cat.captions.shuffle_caption and dog.captions.shuffle_caption
    assert (cat.captions.keep_tokens, dog.captions.keep_tokens) == (1, 2)
    assert (cat.captions.caption_dropout_rate, dog.captions.class_tokens) == (0, "a dog")
    assert (cat.sizes.flip, dog.sizes.flip) == (True, False)
    assert (cat.sizes.resolution, cat.sizes.shortest, cat.sizes.multiple) == ((32, 32), 16, 16)
    captions = [c for b in epoch(data, global_batch=1) for c in b.captions or []]
    assert captions.count("a dog") == 2
    assert sum(c.startswith("one, ") for c in captions) == 6


def test_paths_are_found_from_the_working_folder_and_from_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\n'
    assert read(folder, text).size == 3
    other = folder / "elsewhere"
    making.folder_of(other / "cats", 1)
    monkeypatch.chdir(other)
    assert read(folder, text).size == 1


def test_an_image_in_two_data_sets_has_two_keys_and_one_side_of_the_split(folder: Path) -> None:
    text = "".join(
        f'[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = "cats"\n'
        for side in (32, 48)
    )
    data = read(folder, text)
    assert sorted(keys(epoch(data, global_batch=1)))[:2] == ["cats/000.png", "cats/000.png@2"]
    assert {(r.width, r.images) for r in data.summary().buckets} == {(32, 3), (48, 3)}
    held_out = read(folder, text, validation_split=0.3, split="validation")
    assert held_out.size == 2


def test_metadata_files(folder: Path) -> None:
    (folder / "meta.json").write_text('{"000": {"caption": "from json"}}', encoding="utf-8")
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nmetadata_file = "meta.json"\n'
    data = read(folder, text)
    assert next(data.batches(global_batch=1)).captions == ["from json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flip_aug = true", "flip_augs = true", r"unknown key flip_augs in \[\[datasets\]\] 1 .*"
                                                r"did you mean flip_aug\?"),
        ("[general]", "[genral]", r"unknown key genral .* did you mean general\?"),
        ("num_repeats = 2", "num_repeat = 2", r"did you mean num_repeats\?"),
        ("num_repeats = 2", "resolution = 64", r"resolution .* belongs to \[\[datasets\]\]"),
        ("keep_tokens = 1", "keep_tokens = -1", r"keep_tokens in \[general\].* found -1"),
        ("keep_tokens = 1", "keep_tokens = 'x'", "keep_tokens .* found 'x'"),
        ("num_repeats = 2", "num_repeats = 'x'", "num_repeats .* found 'x'"),
        ("is_reg = false", "is_reg = true", "no is_reg .* regularise against"),
        ("is_reg = false", "alpha_mask = true", "no alpha_mask"),
        ('image_dir = "cats"', 'image_dir = "cows"', "folder of images at .*cows"),
        ('image_dir = "cats"', 'image_dir = "."', "folders below it are subsets"),
        ('image_dir = "cats"', "", "expected image_dir"),
        ("resolution = 32", "resolution = 'big'", "resolution such as 512"),
        ("batch_size = 4", "batch_size = 8", "give --train_batch_size 8"),
        ("[[datasets]]", "[[datasets", "expected TOML"),
        ("bucket_reso_steps = 16", "bucket_reso_steps = 12", "multiple of 8"),
        ("enable_bucket = true", "enable_bucket = 'maybe'", "enable_bucket .* found 'maybe'"),
    ],
)  # fmt: skip
def test_what_is_not_understood(folder: Path, old: str, new: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(PatchError, match=message):
        read(folder, FULL.replace(old, new, 1), train_batch_size=4)


@pytest.mark.parametrize("text", ["", "[[datasets]]\n", "datasets = 3\n"])
def test_files_without_subsets(folder: Path, text: str) -> None:
    with pytest.raises(PatchError, match="at least one"):
        read(folder, text)


def test_only_subsets_that_are_switched_off(folder: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nnum_repeats = 0\n'
    with pytest.raises(PatchError, match="found none to use"):
        read(folder, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="check --dataset_config"):
        opened(dataset_config=str(tmp_path / "no.toml"))


def test_bases_with_class_ids(folder: Path) -> None:
    (folder / "d.toml").write_text(FULL, encoding="utf-8")
    with pytest.raises(PatchError, match="one folder for each class"):
        opened(LABELS, dataset_config=str(folder / "d.toml"))
