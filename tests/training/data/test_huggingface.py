"""Data sets of the `datasets` library: columns, splits, classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, LABELS, NOTHING, Encoders, epoch, opened, picture

datasets = pytest.importorskip("datasets")


def table(**columns: Any) -> Any:
    """Four rows: images and what else is given."""
    images = [{"bytes": making.encoded(picture(n)), "path": None} for n in range(4)]
    made = datasets.Dataset.from_dict({"image": images, **columns})
    return made.cast_column("image", datasets.Image())


def saved(folder: Path, **columns: Any) -> str:
    path = folder / "rows.parquet"
    table(**columns).to_parquet(str(path))
    return str(path)


TEXTS = ["a", "b", "c", "d"]


def test_code_of_a_data_set_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    folder, mark = tmp_path / "rows", tmp_path / "it ran"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    saved(folder, text=TEXTS)
    with pytest.raises(PatchError, match="expected the data set"):
        opened(dataset_name=str(folder))
    assert not mark.exists()


def test_releases_that_can_run_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = saved(tmp_path, text=TEXTS)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(PatchError, match=r"4\.0 or later for --dataset_name, found 3\.6\.0"):
        opened(dataset_name=name)


def test_captions_and_their_column(tmp_path: Path) -> None:
    name = saved(tmp_path, text=TEXTS, other=[["x", "y"]] * 4)
    data = opened(dataset_name=name)
    found = {b.keys[0]: b.captions for b in epoch(data, global_batch=1)}
    assert found["train/00000002"] == ["c"] and len(found) == 4
    drawn = {
        c for n in range(8) for b in epoch(opened(dataset_name=name, caption_column="other"), n)
        for c in b.captions or []
    }  # fmt: skip
    assert drawn == {"x", "y"}
    with pytest.raises(PatchError, match="expected column nope in .* found image, text, other"):
        opened(dataset_name=name, caption_column="nope")


def test_columns_that_are_missing(tmp_path: Path) -> None:
    name = saved(tmp_path, words=TEXTS)
    with pytest.raises(PatchError, match="a column for --caption_column .* found image, words"):
        opened(dataset_name=name)
    with pytest.raises(PatchError, match="--label_column"):
        opened(LABELS, dataset_name=name)
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(PatchError, match="--image_column"):
        opened(dataset_name=str(tmp_path / "t.parquet"))
    assert opened(NOTHING, dataset_name=name).size == 4


def test_labels_of_every_kind(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["w", "x", "y", "z"])
    made = table(label=[3, 2, 1, 0]).cast_column("label", classes)
    made.save_to_disk(str(tmp_path / "disk"))
    data = opened(LABELS, dataset_name=str(tmp_path / "disk"))
    assert [s.label for s in data.samples] == [3, 2, 1, 0]
    assert data.summary().classes == {"w": 1, "x": 1, "y": 1, "z": 1}
    numbers = opened(LABELS, dataset_name=saved(tmp_path, label=[0, 3, 3, 1]))
    assert [s.label for s in numbers.samples] == [0, 3, 3, 1]
    words = opened(LABELS, dataset_name=saved(tmp_path, kind=list("bdac")), label_column="kind")
    assert [s.label for s in words.samples] == [1, 3, 0, 2]
    (tmp_path / "names").write_text("c\nd\na\nb\n", encoding="utf-8")
    listed = opened(LABELS, dataset_name=saved(tmp_path, kind=list("bdac")), label_column="kind",
                    class_list=str(tmp_path / "names"))  # fmt: skip
    assert [s.label for s in listed.samples] == [3, 1, 2, 0]
    with pytest.raises(PatchError, match="found id 9"):
        opened(LABELS, dataset_name=saved(tmp_path, label=[0, 9, 3, 1]))


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=table(text=TEXTS), test=table(text=TEXTS).select([0, 1]))
    both.save_to_disk(str(tmp_path / "both"))
    assert opened(dataset_name=str(tmp_path / "both")).size == 4
    assert opened(dataset_name=str(tmp_path / "both"), dataset_split="test").size == 2
    with pytest.raises(PatchError, match="found train, test: give --dataset_split"):
        opened(dataset_name=str(tmp_path / "both"), dataset_split="dev")


def test_an_image_folder_of_the_library(tmp_path: Path) -> None:
    making.folder_of(tmp_path / "train", 3, captions=False)
    rows = "\n".join(f'{{"file_name": "{n:03d}.png", "text": "t {n}"}}' for n in range(3))
    (tmp_path / "train" / "metadata.jsonl").write_text(rows, encoding="utf-8")
    data = opened(dataset_name=str(tmp_path))
    assert sorted(b.captions[0] for b in epoch(data, global_batch=1)) == ["t 0", "t 1", "t 2"]


def test_caches_need_a_place_and_use_the_content(tmp_path: Path) -> None:
    name = saved(tmp_path, text=TEXTS)
    with pytest.raises(PatchError, match="give --cache_dir"):
        opened(CAPTIONS, dataset_name=name, cache_latents_to_disk=True)
    made = []
    for texts in (TEXTS, TEXTS[::-1]):
        encoders = Encoders()
        data = opened(CAPTIONS, dataset_name=saved(tmp_path, text=texts),
                      cache_latents_to_disk=True, cache_dir=str(tmp_path / "cache"))  # fmt: skip
        data.prepare_caches(encoders)
        made.append(encoders.images)
    assert made == [4, 0]


def test_broken_rows_are_named(tmp_path: Path) -> None:
    images = [
        {"bytes": b"broken", "path": None},
        {"bytes": making.encoded(picture(1)), "path": None},
    ]
    made = datasets.Dataset.from_dict({"image": images, "text": ["a", "b"]})
    made.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "b.parquet"))
    name = str(tmp_path / "b.parquet")
    with pytest.raises(PatchError, match=r"image in .*b\.parquet, row 0"):
        opened(dataset_name=name, max_broken=0)
    data = opened(dataset_name=name)
    assert data.size == 1 and "train/00000000" in data.summary().skipped[0].text


def test_structs_plain_bytes_and_rows_without_an_image(tmp_path: Path) -> None:
    data = making.encoded(picture(1))
    rows: list[Any] = [{"bytes": data, "path": None}, None, {"bytes": None, "path": None}]
    made = datasets.Dataset.from_dict({"picture": rows, "text": ["a", "b", "c"]})
    made.to_parquet(str(tmp_path / "structs.parquet"))
    found = opened(dataset_name=str(tmp_path / "structs.parquet"), max_broken=0)
    assert [s.captions for s in found.samples] == [("a",)]
    (line,) = found.summary().skipped
    assert line.count == 2 and line.text.startswith("2 rows without an image")
    assert len(epoch(found, global_batch=1)) == 1
    plain = datasets.Dataset.from_dict({"jpg": [data, data], "text": ["a", "b"]})
    plain.to_parquet(str(tmp_path / "bytes.parquet"))
    assert opened(dataset_name=str(tmp_path / "bytes.parquet")).size == 2


def test_rows_without_what_the_base_takes(tmp_path: Path) -> None:
    texts = saved(tmp_path, text=[*TEXTS[:3], None])
    with pytest.raises(PatchError, match="1 of 4 without one"):
        opened(dataset_name=texts)
    found = opened(dataset_name=texts, skip_broken=True)
    assert found.size == 3 and "images without a caption" in found.summary().skipped[0].text
    labels = saved(tmp_path, label=[0, 1, None, 3])
    with pytest.raises(PatchError, match="a class id in .*train/00000002, found none"):
        opened(LABELS, dataset_name=labels)
    assert opened(LABELS, dataset_name=labels, skip_broken=True).size == 3


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="check --dataset_name"):
        opened(dataset_name=str(tmp_path / "missing.parquet"))


def test_the_library_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(PatchError, match="pip install datasets"):
        opened(dataset_name="someone/something")
