"""What holds for every source: nothing dropped, no state, the same on any number of processes."""

from __future__ import annotations

import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, LABELS, NOTHING, assert_equal, epoch, keys, opened
from training.data.batch import Data, Position
from training.data.build import open_splits
from training.data.indexed import IndexedData
from training.data.sources.digits import KIND as DIGITS
from training.options.data_options import DataOptions

SOURCES = ["folder", "repeats", "classes", "plain", "config", "shards", "parquet", "disk", "digits"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets, made once."""
    root = tmp_path_factory.mktemp("data")
    making.folder_of(root / "folder" / "deep", 11)
    making.folder_of(root / "repeats" / "2_cat", 4)
    making.folder_of(root / "repeats" / "3_dog", 3, captions=False, start=4)
    for n, name in enumerate(["ant", "bee", "cow", "dog"]):
        making.folder_of(root / "classes" / name, 3, captions=False, start=5 * n)
    making.folder_of(root / "plain", 9, captions=False)
    (root / "config.toml").write_text(
        "[general]\nenable_bucket = true\nresolution = 32\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'folder/deep'\nnum_repeats = 2\n"
        "[[datasets]]\nresolution = [48, 48]\n[[datasets.subsets]]\nimage_dir = 'folder/deep'\n",
        encoding="utf-8",
    )
    making.shards_of(root / "shards", [7, 5, 9])
    datasets = pytest.importorskip("datasets")
    rows = [making.encoded(making.picture(n)) for n in range(9)]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": row, "path": None} for row in rows],
         "text": [f"row {n}" for n in range(9)], "label": [n % 4 for n in range(9)]},
        features=datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string"),
             "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
        ),
    )  # fmt: skip
    table.to_parquet(str(root / "rows.parquet"))
    table.save_to_disk(str(root / "disk"))
    return root


def source(place: Path, name: str, **more: Any) -> Data:
    """One of the data sets with what makes it interesting."""
    kinds = {"classes": LABELS, "plain": NOTHING, "digits": DIGITS, "disk": LABELS}
    options: dict[str, dict[str, Any]] = {
        "config": {"dataset_config": str(place / "config.toml")},
        "shards": {"webdataset": f"{place.as_posix()}/shards", "shuffle_buffer": 8},
        "parquet": {"dataset_name": str(place / "rows.parquet")},
        "disk": {"dataset_name": str(place / "disk"), "flip_aug": True},
        "digits": {"dataset_name": "digits"},
    }
    general: dict[str, Any] = {"caption_dropout_rate": 0.3}
    kind = kinds.get(name, CAPTIONS)
    if kind is CAPTIONS:
        general |= {"enable_bucket": True, "shuffle_caption": True}
    if name not in ("digits", "disk"):
        general |= {"flip_aug": True, "random_crop": True}
    if name == "plain":
        del general["caption_dropout_rate"]
    chosen = options.get(name, {"train_data_dir": str(place / name)})
    return opened(kind, **{**general, **chosen, **more})


@pytest.mark.parametrize("name", SOURCES)
def test_every_image_is_seen_in_every_epoch(place: Path, name: str) -> None:
    data = source(place, name)
    size = data.summary().images
    assert size
    if name == "shards":  # lanes drift: every image is seen once before one is seen three times
        seen = Counter(keys(epoch(data, global_batch=4) + epoch(data, 1, 4) + epoch(data, 2, 4)))
        assert len(seen) == size
        assert max(seen.values()) - min(seen.values()) <= 2
        return
    batch = 64 if name == "digits" else 4
    for number in (0, 1, 5):
        seen = Counter(keys(epoch(data, number, batch)))
        assert len(seen) == size
        filled = data.summary().filled(batch)
        assert sum(seen.values()) == data.size + filled


@pytest.mark.parametrize("name", SOURCES)
def test_resuming_anywhere_is_going_on(place: Path, name: str) -> None:
    data = source(place, name)
    whole = making.take(data.batches(global_batch=4), 25)
    for cut in (0, 3, 13):
        again = source(place, name)  # another process
        for expected, found in zip(
            whole[cut + 1 :], again.batches(global_batch=4, start=whole[cut].next), strict=False
        ):
            assert_equal(expected, found)


@pytest.mark.parametrize("name", SOURCES)
def test_ranks_share_what_one_process_has(place: Path, name: str) -> None:
    data = source(place, name)
    one = making.take(data.batches(global_batch=4), 8)
    for world in (2, 4):
        ranks = [
            making.take(source(place, name).batches(global_batch=4, rank=r, world=world), 8)
            for r in range(world)
        ]
        for n, batch in enumerate(one):
            parts = [rank[n] for rank in ranks]
            assert [key for part in parts for key in part.keys] == batch.keys
            if batch.captions is not None:
                assert [c for part in parts for c in part.captions or []] == batch.captions
            assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
            assert all(part.next == batch.next for part in parts)


def test_batches_hold_what_the_interface_says(place: Path) -> None:
    for name in SOURCES:
        batch = next(source(place, name).batches(global_batch=4))
        assert batch.pixels is not None and batch.pixels.dtype == torch.float32
        assert batch.pixels.shape[0] == len(batch) == 4
        assert -1 <= float(batch.pixels.min()) < float(batch.pixels.max()) <= 1
        assert batch.sizes.shape == (4, 6) and batch.sizes.dtype == torch.int64
        assert tuple(batch.pixels.shape[2:]) == tuple(batch.sizes[0, 4:].tolist())
        labelled = name in ("classes", "digits", "disk")
        assert (batch.labels is not None) == labelled
        assert (batch.captions is not None) == (not labelled and name != "plain")
        assert batch.next == Position(0, 1)
        moved = batch.to("cpu")
        assert_equal(batch, moved)


def test_seeds_differ_and_the_split_does_not(place: Path) -> None:
    first, second = (source(place, "folder", seed=seed) for seed in (1, 2))
    assert keys(epoch(first)) != keys(epoch(second))
    assert keys(epoch(first, 0)) != keys(epoch(first, 1))
    chosen = [
        set(keys(epoch(source(place, "folder", seed=seed, split="validation",
                              validation_split=0.3))))
        for seed in (1, 2)
    ]  # fmt: skip
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("name", ["folder", "repeats", "classes", "config", "shards", "parquet"])
def test_validation_is_apart_and_counts_each_image_once(place: Path, name: str) -> None:
    everything = set(keys(epoch(source(place, name)))) if name != "shards" else None
    training = source(place, name, validation_split=0.25)
    held_out = source(place, name, validation_split=0.25, split="validation")
    batches = epoch(held_out)
    weights = [b.weights if b.weights is not None else torch.ones(len(b)) for b in batches]
    counted = Counter[str]()
    for batch, weight in zip(batches, weights, strict=True):
        for key, value in zip(batch.keys, weight.tolist(), strict=True):
            counted[key] += int(value)
    if everything is not None:
        assert set(counted.values()) == {1}
        assert set(keys(epoch(training))) | set(counted) == everything
        images = [{key.split("@")[0] for key in part} for part in (counted, keys(epoch(training)))]
        assert not images[0] & images[1]
    else:
        assert not {k.split("!")[0] for k in counted} & {
            k.split("!")[0] for k in keys(epoch(training))
        }
    for first, second in zip(batches, epoch(held_out), strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_workers_change_nothing(place: Path, name: str) -> None:
    data = source(place, name)
    alone = making.take(data.batches(global_batch=4), 9)
    for persistent in (True, False) if name == "folder" else (True,):
        batches = data.batches(global_batch=4, workers=2, persistent=persistent)
        for expected, found in zip(alone, batches, strict=False):
            assert_equal(expected, found)


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_the_global_generator_is_left_alone(place: Path, name: str) -> None:
    """A run that loads data once more, after a resume, must not draw other numbers."""
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(source(place, name).batches(global_batch=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_workers_may_be_spawned(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and macOS: everything that goes to a worker can be pickled."""
    from training.data import loader as loading

    data = source(place, "folder")
    expected = next(data.batches(global_batch=4))
    spawning = partial(torch.utils.data.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(loading, "DataLoader", spawning)
    assert_equal(expected, next(data.batches(global_batch=4, workers=1)))


@pytest.mark.parametrize("name", SOURCES)
def test_what_workers_get_can_be_pickled(place: Path, name: str) -> None:
    data = source(place, name)
    again = pickle.loads(pickle.dumps(data))
    assert_equal(next(data.batches(global_batch=4)), next(again.batches(global_batch=4)))


def test_a_batch_that_ranks_cannot_share(place: Path) -> None:
    data = source(place, "folder")
    with pytest.raises(PatchError, match="share equally, found 5"):
        data.batches(global_batch=5, rank=0, world=2)


def test_labels_are_dropped_to_the_null_label(place: Path) -> None:
    data = source(place, "classes", caption_dropout_rate=0.5)
    labels = torch.cat([b.labels for n in range(30) for b in epoch(data, n)])
    dropped = (labels == LABELS.null_label).float().mean()
    assert 0.42 < float(dropped) < 0.58
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}


def test_missing_data_gives_examples_that_can_be_copied() -> None:
    with pytest.raises(PatchError) as caught:
        opened()
    for name in ("--train_data_dir", "--dataset_config", "--webdataset", "--dataset_name"):
        assert name in str(caught.value)


def test_two_sources_are_one_too_many(place: Path) -> None:
    with pytest.raises(PatchError, match="one source of data, found --train_data_dir and"):
        source(place, "folder", dataset_name="digits")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shards", {"in_json": "x.json"}),
        ("folder", {"class_list": "x.txt"}),
        ("folder", {"image_column": "x"}),
        ("parquet", {"label_column": "x"}),
        ("shards", {"conditioning_data_dir": "x"}),
    ],
)
def test_options_are_not_passed_over(place: Path, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PatchError, match=f"expected --{next(iter(options))} only with"):
        source(place, name, **options)


def test_the_seed_of_the_split_counts_where_no_share_is_given(place: Path) -> None:
    """The trainer holds images out by itself; --validation_seed chooses which."""

    def held_out(**more: Any) -> tuple[str, ...]:
        options = DataOptions(train_data_dir=str(place / "folder"), validation_split=None, **more)
        train, held = open_splits(options, CAPTIONS, seed=1, share=lambda count: 2 / count)
        assert held is not None and train.size + held.size == 11
        assert isinstance(held, IndexedData)
        return tuple(sample.key for sample in held.samples)

    assert held_out() == held_out()
    assert len({held_out(validation_seed=n) for n in range(8)}) > 2


def test_validation_needs_a_share(place: Path) -> None:
    with pytest.raises(PatchError, match="give --validation_split"):
        source(place, "folder", split="validation")


def test_a_base_that_cannot_drop_labels(place: Path) -> None:
    from dataclasses import replace

    kind = replace(LABELS, null_label=None)
    with pytest.raises(PatchError, match="caption_dropout_rate 0"):
        opened(kind, train_data_dir=str(place / "classes"), caption_dropout_rate=0.1)
