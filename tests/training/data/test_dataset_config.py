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
from training.data.rules import CAPTION_RULES, SIZE_RULES
from training.options.dataset_file import CAPTION_KEYS, SIZE_KEYS, read_dataset_file
from training.options.problems import ConfigError


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
    data = read(folder, FULL.replace("batch_size = 4\n", ""), caption_dropout_rate=0.9)
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
        ("is_reg = false", "face_crop_aug_range = '2.0,4.0'", "no face_crop_aug_range .* faces"),
        ('image_dir = "cats"', 'image_dir = "cows"', "folder of images at .*cows"),
        ('image_dir = "cats"', 'image_dir = "."', "folders below it are subsets"),
        ('image_dir = "cats"', "", "expected image_dir"),
        ("resolution = 32", "resolution = 'big'", "resolution such as 512"),
        ("batch_size = 4", "batch_size = 0", "batch_size .* found 0"),
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
    with pytest.raises(PatchError, match="none that can be used: 3 images of cats"):
        read(folder, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="check --dataset_config"):
        opened(dataset_config=str(tmp_path / "no.toml"))


def test_bases_with_class_ids(folder: Path) -> None:
    (folder / "d.toml").write_text(FULL, encoding="utf-8")
    with pytest.raises(PatchError, match="one folder for each class"):
        opened(LABELS, dataset_config=str(folder / "d.toml"))


def test_all_problems_of_a_file_are_told_at_once(folder: Path) -> None:
    text = FULL.replace("keep_tokens = 1", "keep_token = 1").replace('image_dir = "dogs"', "")
    text = text.replace("num_repeats = 2", "num_repeats = 'x'")
    with pytest.raises(PatchError) as caught:
        read(folder, text)
    for part in ("unknown key keep_token", "expected image_dir", "num_repeats in"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError) as early:
        read_dataset_file(folder / "dataset.toml")
    assert len(early.value.problems) == 3


def test_missing_folders_are_told_at_once(folder: Path) -> None:
    text = FULL.replace('"cats"', '"cows"').replace('"dogs"', '"pigs"')
    with pytest.raises(PatchError, match=r"cows.*\n.*pigs"):
        read(folder, text)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("keep_token", "did you mean keep_tokens?"), ("repeats", "did you mean num_repeats?"),
        ("face_crop_aug_rang", "docs/DATA.md"), ("clip_g", "docs/DATA.md"),
        ("dim_from_weights", "docs/DATA.md"), ("token_warmup_steps", "docs/DATA.md"),
        ("network_multiplie", "docs/DATA.md"), ("in_json", "did you mean metadata_file?"),
    ],
)  # fmt: skip
def test_hints_name_a_key_of_like_meaning_or_none(folder: Path, key: str, hint: str) -> None:
    with pytest.raises(PatchError) as caught:
        read(folder, FULL.replace("num_repeats = 2", f"{key} = 2"))
    assert f"unknown key {key}" in str(caught.value) and hint in str(caught.value)


def test_keys_without_effect_are_notes_and_keys_that_are_off_are_nothing(folder: Path) -> None:
    off = "prior_loss_weight = 0\ntoken_warmup_step = 0\nface_crop_aug_range = ''\n"
    text = FULL.replace("[general]", f"[general]\n{off}cache_info = true\nclass_tokens = ''")
    notes = read(folder, text).summary().notes
    assert [note.split()[0] for note in notes if "changes nothing" in note] == ["cache_info"]


def test_regularisation_images_are_left_out(folder: Path) -> None:
    data = read(folder, FULL.replace("is_reg = false", "is_reg = true"))
    assert {sample.subset.name for sample in data.samples} == {"cats"}
    assert any("is_reg" in note and "left out" in note for note in data.summary().notes)


def test_the_reader_knows_every_rule_of_a_subset() -> None:
    assert set(CAPTION_RULES) == CAPTION_KEYS
    assert set(SIZE_RULES) == SIZE_KEYS | {"flip_aug", "random_crop", "color_aug"}


def test_a_file_that_replaces_the_folder(folder: Path) -> None:
    """Kohya's scripts take both, and then read the file."""
    data = read(folder, FULL, train_data_dir=str(folder), in_json="captions.json")
    assert data.size == 8
    for name in ("train_data_dir", "in_json"):
        assert any(f"--{name} is not used" in note for note in data.summary().notes)


BOTH = """
[[datasets]]
batch_size = 3
[[datasets.subsets]]
image_dir = "cats"
num_repeats = 3
[[datasets]]
{other}
resolution = 48
[[datasets.subsets]]
image_dir = "dogs"
class_tokens = "a dog"
"""


def test_batch_sizes_of_data_sets(folder: Path) -> None:
    """9 cats by 3, 2 dogs by 2 or as the command line says; times the processes."""
    data = read(folder, BOTH.format(other="batch_size = 2"))
    batches = epoch(data, global_batch=1)
    assert len(batches) == data.batches_per_epoch(1) == 4
    assert sorted((len(b), b.pixels.shape[-1]) for b in batches if b.pixels is not None) == [
        (2, 48), (3, 32), (3, 32), (3, 32),
    ]  # fmt: skip
    assert Counter(keys(batches)) == Counter(s.key for s in data.samples for _ in range(
        s.subset.repeats))  # fmt: skip
    assert "steps per epoch: 4 of batch 2 and 3" in data.summary().text(1)
    default = read(folder, BOTH.format(other=""))
    assert sorted(len(b) for b in epoch(default, global_batch=1)) == [1, 1, 3, 3, 3]
    held_out = read(folder, BOTH.format(other="batch_size = 2"), split="test")
    assert {len(b) for b in epoch(held_out, global_batch=4)} == {4}


def test_batch_sizes_of_data_sets_resume_and_divide(folder: Path) -> None:
    data = read(folder, BOTH.format(other="batch_size = 2"), flip_aug=True)
    whole = making.take(data.batches(global_batch=2, world=1), 11)
    for cut in (0, 3, 4, 8):
        rest = making.take(data.batches(global_batch=2, start=whole[cut].next), 11 - cut - 1)
        for expected, found in zip(whole[cut + 1 :], rest, strict=True):
            making.assert_equal(expected, found)
    assert data.batches_per_epoch(2, 2) == 2 + 1
    ranks = [making.take(data.batches(global_batch=2, rank=rank, world=2), 6) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert len(first) == len(second) in (2, 3) and first.next == second.next
    one_epoch = [batch for rank in ranks for batch in rank[:3]]
    assert set(keys(one_epoch)) == {sample.key for sample in data.samples}


def test_validation_of_data_sets(folder: Path) -> None:
    text = BOTH.format(other="validation_split = 0.5\nvalidation_seed = 1")
    train = {s.key for s in read(folder, text).samples}
    held_out = {s.key for s in read(folder, text, split="validation").samples}
    assert len(held_out) == 1 and held_out < {"dogs/010.png", "dogs/011.png"}
    assert train | held_out == {f"cats/{n:03d}.png" for n in range(3)} | {
        "dogs/010.png", "dogs/011.png"}  # fmt: skip
    assert not train & held_out
    seeds = {
        tuple(s.key for s in read(folder, text.replace("seed = 1", f"seed = {n}"),
                                  split="validation").samples)
        for n in range(12)
    }  # fmt: skip
    assert len(seeds) == 2


def test_an_image_kept_for_validation_is_trained_by_no_data_set(folder: Path) -> None:
    text = "".join(
        f'[[datasets]]\nresolution = {side}\n{more}\n[[datasets.subsets]]\nimage_dir = "cats"\n'
        for side, more in ((32, ""), (48, "validation_split = 0.3"))
    )
    held_out = read(folder, text, split="validation")
    assert [s.key for s in held_out.samples] == ["cats/000.png@2"] or held_out.size == 1
    (image,) = {s.origin for s in held_out.samples}
    data = read(folder, text)
    assert image not in {s.origin or s.key for s in data.samples} and data.size == 4
    assert any("1 images are not trained" in note for note in data.summary().notes)


def test_reading_a_file_needs_no_torch() -> None:
    """The command line reads dataset files before anything that takes seconds is imported."""
    import ast

    import training.options.dataset_file as module

    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    allowed = ("dmp_common.errors",)  # has no imports
    late = [name for name in names if name and name.startswith(("dmp_common", "torch"))]
    assert set(late) <= set(allowed)
