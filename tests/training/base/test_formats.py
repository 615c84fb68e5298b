"""The command from end to end on every format of data, with the tiny Stable Diffusion or DiT."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dmp_common import Patch
from tests.training.conftest import Train
from tests.training.data.making import encoded, folder_of, picture, shards_of


def repeats(root: Path) -> list[str]:
    """kohya's `10_name` folders."""
    folder_of(root / "2_red cat", 2, captions=False)
    folder_of(root / "1_dog", 2, start=5)
    return ["--train_data_dir", str(root)]


def json_metadata(root: Path) -> list[str]:
    """kohya's `in_json`."""
    folder_of(root / "images", 3, captions=False)
    entries = {f"{n:03d}": {"caption": f"number {n}", "tags": "a, b"} for n in range(3)}
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return ["--train_data_dir", str(root / "images"), "--in_json", str(root / "meta.json")]


def dataset_file(root: Path) -> list[str]:
    """kohya's dataset TOML, with subsets and repeats."""
    folder_of(root / "cats", 3)
    folder_of(root / "dogs", 2, captions=False, start=7)
    (root / "data.toml").write_text(
        "[general]\nshuffle_caption = true\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 16\nenable_bucket = true\nbucket_reso_steps = 16\n"
        "min_bucket_reso = 16\nmax_bucket_reso = 32\n"
        '[[datasets.subsets]]\nimage_dir = "cats"\nnum_repeats = 3\n'
        '[[datasets.subsets]]\nimage_dir = "dogs"\nclass_tokens = "dog"\nflip_aug = true\n',
        encoding="utf-8",
    )
    return ["--dataset_config", str(root / "data.toml")]


def shards(root: Path) -> list[str]:
    """Webdataset shards."""
    pytest.importorskip("webdataset")
    return ["--webdataset", shards_of(root, [3, 2])]


def table(root: Path) -> list[str]:
    """A Hugging Face data set."""
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(4)]
    made = datasets.Dataset.from_dict({"image": images, "text": ["a", "b", "c", "d"]})
    made.cast_column("image", datasets.Image()).to_parquet(str(root / "rows.parquet"))
    return ["--dataset_name", str(root / "rows.parquet")]


@pytest.mark.parametrize("make", [repeats, json_metadata, dataset_file, shards, table])
def test_captioned_formats(make: Callable[[Path], list[str]], train: Train, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    out = train("sd15", *make(root), "--max_train_steps", "2", data="")
    patch = Patch.load(out / "tiny-sd15-dmp.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())


@pytest.mark.parametrize("name", ["shards", "table"])
def test_classes_of_other_formats(name: str, train: Train, tmp_path: Path) -> None:
    if name == "shards":
        pytest.importorskip("webdataset")
        source = ["--webdataset", shards_of(tmp_path / "shards", [3, 2])]
    else:
        datasets = pytest.importorskip("datasets")
        images = [{"bytes": encoded(picture(n)), "path": None} for n in range(4)]
        made = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 1]})
        made.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "rows.parquet"))
        source = ["--dataset_name", str(tmp_path / "rows.parquet")]
    out = train("dit", *source, "--max_train_steps", "2", data="")
    assert Patch.load(out / "tiny-dit-dmp.safetensors").metadata["ss_steps"] == "2"


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")
def test_shards_are_continued(train: Train, tmp_path: Path) -> None:
    """Four steps in two runs are the four steps of one."""
    source = ["--webdataset", shards_of(tmp_path / "shards", [3, 2, 4]), "--train_batch_size", "2"]
    whole = train("sd15", *source, "--max_train_steps", "4", data="")
    expected = Patch.load(whole / "tiny-sd15-dmp.safetensors").tensors()
    two = ["--output_dir", str(tmp_path / "two"), "--save_state", "--save_every_n_steps", "2"]
    train("sd15", *source, *two, "--max_train_steps", "2", data="")
    train("sd15", *source, *two, "--max_train_steps", "4", "--resume", "latest", data="")
    found = Patch.load(tmp_path / "two" / "tiny-sd15-dmp.safetensors").tensors()
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
