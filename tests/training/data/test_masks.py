"""Masks: from the opacity of images or from files, cut, mirrored and cached as the images are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmp_common import PatchError
from tests.training.data import making
from tests.training.data.making import CAPTIONS, NOTHING, Encoders, epoch, opened, picture
from training.data.batch import Batch


def cutout(number: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A picture whose red channel is its opacity: so a mask can be checked against its image."""
    red = np.asarray(picture(number, size))[..., 0].astype(np.float32)
    smooth = Image.fromarray(red).resize((6, 4)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(smooth).round().astype(np.uint8)
    return Image.fromarray(np.stack([values] * 3, -1))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(image.getchannel(0))
    return image


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "masks" / "deep").mkdir(parents=True)
    (tmp_path / "clear").mkdir()
    for n, name in enumerate(["a", "deep/b"]):
        image = cutout(n)
        image.save(tmp_path / "images" / f"{name}.png")
        image.resize((24, 16)).save(tmp_path / "masks" / f"{name}.jpg", quality=100)
        with_alpha(image).save(tmp_path / "clear" / f"{n}.png")
    picture(7).save(tmp_path / "clear" / "opaque.png")
    return tmp_path


def assert_alike(batch: Batch) -> None:
    """The mask is where the red of the image is."""
    assert batch.pixels is not None and batch.masks is not None
    assert batch.masks.dtype == torch.float32
    assert batch.masks.shape == (len(batch), 1, *batch.pixels.shape[2:])
    assert float(batch.masks.min()) >= 0 and float(batch.masks.max()) <= 1
    red = (batch.pixels[:, :1] + 1) / 2
    assert float((red - batch.masks).abs().mean()) < 0.05


FLIPS: list[dict[str, Any]] = [{}, {"flip_aug": True, "random_crop": True}, {"enable_bucket": True}]


@pytest.mark.parametrize("options", FLIPS)
def test_masks_from_files_go_with_their_images(places: Path, options: dict[str, Any]) -> None:
    data = opened(
        CAPTIONS, train_data_dir=str(places / "images"), class_tokens="x",
        conditioning_data_dir=str(places / "masks"), **options,
    )  # fmt: skip
    for number in range(4):
        for batch in epoch(data, number, global_batch=2):
            assert_alike(batch)


def test_masks_of_opacity(places: Path) -> None:
    data = opened(NOTHING, train_data_dir=str(places / "clear"), alpha_mask=True, flip_aug=True)
    masks = {}
    for number in range(3):
        for batch in epoch(data, number, global_batch=1):
            assert batch.masks is not None
            masks[batch.keys[0]] = batch.masks
    assert bool((masks["opaque.png"] == 1).all())
    assert 0.1 < float(masks["0.png"].mean()) < 0.9
    without = next(opened(NOTHING, train_data_dir=str(places / "clear")).batches(global_batch=3))
    assert without.masks is None


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("source", ["files", "opacity"])
def test_cached_masks_are_uncached_masks(places: Path, source: str, to_disk: bool) -> None:
    options: dict[str, Any] = {"flip_aug": True, "class_tokens": "x"}
    if source == "files":
        options |= {"train_data_dir": str(places / "images"),
                    "conditioning_data_dir": str(places / "masks")}  # fmt: skip
    else:
        options |= {"train_data_dir": str(places / "clear"), "alpha_mask": True}
    name = "cache_latents_to_disk" if to_disk else "cache_latents"
    plain, cached = opened(**options), opened(**options, **{name: True})
    cached.prepare_caches(Encoders())
    for number in range(3):
        for one, other in zip(epoch(plain, number), epoch(cached, number), strict=True):
            assert one.keys == other.keys and other.moments is not None
            assert one.masks is not None and other.masks is not None
            assert torch.equal(one.masks, other.masks)


def test_a_changed_mask_is_never_stale(places: Path) -> None:
    options: dict[str, Any] = {
        "train_data_dir": str(places / "images"), "class_tokens": "x",
        "conditioning_data_dir": str(places / "masks"), "cache_latents_to_disk": True,
    }  # fmt: skip
    encoders = Encoders()
    opened(**options).prepare_caches(encoders)
    Image.new("L", (48, 32), 255).save(places / "masks" / "a.jpg")
    data = opened(**options)
    data.prepare_caches(encoders)
    assert encoders.images == 3
    masks = {b.keys[0]: b.masks for b in epoch(data, global_batch=1)}
    assert masks["a.png"] is not None and bool((masks["a.png"] == 1).all())


def test_masks_that_are_missing(places: Path) -> None:
    picture(1).save(places / "images" / "c.png")
    options: dict[str, Any] = {"train_data_dir": str(places / "images"),
                               "conditioning_data_dir": str(places / "masks")}  # fmt: skip
    with pytest.raises(PatchError, match=r"a mask for .*c\.png in .*masks"):
        opened(NOTHING, **options)
    data = opened(NOTHING, **options, skip_broken=True)
    assert data.size == 2 and data.summary().skipped[0].text == "1 images without a mask (c)"


def test_masks_of_a_dataset_file(places: Path) -> None:
    (places / "d.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\n"
        "conditioning_data_dir = 'masks'\nclass_tokens = 'x'\n"
        "[[datasets.subsets]]\nimage_dir = 'clear'\nalpha_mask = true\nclass_tokens = 'x'\n",
        encoding="utf-8",
    )
    data = opened(dataset_config=str(places / "d.toml"))
    masks = {b.keys[0]: b.masks for b in epoch(data, global_batch=1)}
    assert set(masks) == {"images/a.png", "clear/0.png", "clear/1.png", "clear/opaque.png"}
    assert all(mask is not None for mask in masks.values())


def test_masks_of_shards(places: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    image = making.encoded(with_alpha(cutout(0)))
    place = making.shard_of(tmp_path / "0.tar", {"0": {"png": image, "txt": b"x"}})
    batch = next(opened(webdataset=str(place), alpha_mask=True).batches(global_batch=2))
    assert batch.masks is not None and 0.1 < float(batch.masks.mean()) < 0.9


def test_batches_move_with_their_masks(places: Path) -> None:
    data = opened(NOTHING, train_data_dir=str(places / "clear"), alpha_mask=True)
    batch = next(data.batches(global_batch=1)).to("meta")
    assert batch.masks is not None and batch.masks.device.type == "meta"
