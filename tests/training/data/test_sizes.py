"""Buckets: every image has one, it fits the base, and little is cut off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmp_common import PatchError
from tests.training.data.making import picture
from training.data.augment import vary_color
from training.data.images import to_tensor
from training.data.kind import DataKind
from training.data.rules import parse_resolution
from training.data.sizes import (
    SizeRules,
    bucket_sizes,
    crop_and_resize,
    fit,
    size_rules,
)

KIND = DataKind("caption")
SIDES = st.integers(1, 9000)


def rules(kind: DataKind = KIND, **options: Any) -> SizeRules:
    given: dict[str, Any] = dict(
        resolution=None, enable_bucket=True, min_bucket_reso=None, max_bucket_reso=None,
        bucket_reso_steps=None, bucket_no_upscale=False, flip_aug=False, random_crop=False,
        color_aug=False,
    )  # fmt: skip
    return size_rules(kind, **{**given, **options})


def test_the_buckets_are_kohyas() -> None:
    """For 512: 256 to 1024 in steps of 64, as kohya's defaults give."""
    sizes = bucket_sizes(rules())
    assert (512, 512) in sizes and (256, 1024) in sizes and (1024, 256) in sizes
    assert (576, 448) in sizes and (640, 384) in sizes and (832, 256) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(w * h <= 512 * 512 and min(w, h) >= 256 and max(w, h) <= 1024 for w, h in sizes)
    assert len(bucket_sizes(rules(resolution=(1024, 1024), max_bucket_reso=2048))) > 20


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.sampled_from([8, 16, 32, 64]), st.booleans(), st.sampled_from([256, 512]))
def test_every_image_fits(width: int, height: int, step: int, keep: bool, side: int) -> None:
    made = rules(DataKind("caption", multiple=8), bucket_reso_steps=step,
                 resolution=(side, side), bucket_no_upscale=keep)  # fmt: skip
    how = fit((width, height), made)
    assert all(value % step == 0 and value >= step for value in how.target)
    assert all(r >= t for r, t in zip(how.resized, how.target, strict=True))
    assert 0 <= how.cropped < 1
    if not keep:
        assert how.target in bucket_sizes(made)
    elif min(width, height) >= step:
        assert all(r <= s for r, s in zip(how.resized, (width, height), strict=True))
        assert math.prod(how.target) <= side * side
    for at in (None, (0.0, 0.0), (0.999, 0.999)):
        left, top = how.crop(at)
        assert 0 <= left <= how.resized[0] - how.target[0]
        assert 0 <= top <= how.resized[1] - how.target[1]


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 3.3), st.integers(600, 4000))
def test_ordinary_shapes_lose_little(ratio: float, width: int) -> None:
    """The steps of the buckets, not their choice, decide what is cut off."""
    how = fit((width, max(1, round(width / ratio))), rules())
    assert how.cropped < 0.2
    turned = fit((max(1, round(width / ratio)), width), rules())
    assert turned.target == how.target[::-1]


def test_without_buckets_all_have_one_size() -> None:
    made = rules(enable_bucket=False)
    assert {fit(size, made).target for size in ((1, 900), (512, 512), (37, 12))} == {(512, 512)}


def test_pixels_are_those_of_resizing_and_then_cropping() -> None:
    image = picture(3, (97, 60))
    how = fit(image.size, rules(DataKind("caption", multiple=8), enable_bucket=False,
                                resolution=(32, 32)))  # fmt: skip
    left, top = how.crop()
    found = crop_and_resize(image, how, left, top)
    whole = image.resize(how.resized, Image.Resampling.LANCZOS)
    expected = whole.crop((left, top, left + 32, top + 32))
    away = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
    assert found.size == (32, 32) and away.max() <= 2
    assert crop_and_resize(found, fit((32, 32), rules(DataKind("caption", multiple=8),
                           enable_bucket=False, resolution=(32, 32))), 0, 0) is found  # fmt: skip


def test_random_crops_reach_every_place() -> None:
    how = fit((64, 32), rules(DataKind("caption", multiple=8), enable_bucket=False,
                              resolution=(32, 32)))  # fmt: skip
    found = {how.crop((x / 100, 0.5))[0] for x in range(100)}
    assert found == set(range(33))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KIND, {"bucket_reso_steps": 32}, "multiple of 64"),
        (KIND, {"enable_bucket": False, "resolution": (500, 512)}, "nearest is 512 x 512"),
        (KIND, {"min_bucket_reso": 900, "max_bucket_reso": 1000}, "found none"),
        (DataKind("label", square=True), {}, "square"),
        (
            DataKind("label", square=True),
            {"enable_bucket": False, "resolution": (512, 256)},
            "512 x 256",
        ),
    ],
)  # fmt: skip
def test_sizes_a_base_cannot_take(kind: DataKind, options: Any, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        rules(kind, **options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("512", (512, 512)), ("768,512", (768, 512)), ("768x512", (768, 512)), (64, (64, 64)),
     ([64, 128], (64, 128)), (None, None)],
)  # fmt: skip
def test_ways_to_write_a_resolution(value: Any, expected: Any) -> None:
    assert parse_resolution(value) == expected


@pytest.mark.parametrize("value", ["big", "1,2,3", "-5", "", [1, "x"], "0"])
def test_what_is_no_resolution(value: Any) -> None:
    with pytest.raises(PatchError, match="resolution such as 512"):
        parse_resolution(value)


def test_colour_changes_are_small_drawn_and_repeatable() -> None:
    image = picture(1, (8, 8))
    one, again, other = (to_tensor(vary_color(image, 1, epoch, "a")) for epoch in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert 0 < float((one - to_tensor(image)).abs().mean()) < 0.3
    # Brightness stays: of a colour only its hue turns, and grey has none.
    grey = Image.new("RGB", (2, 2), (128, 128, 128))
    changed = np.asarray(vary_color(grey, 1, 0, "a"))
    assert np.ptp(changed) == 0 and abs(int(changed[0, 0, 0]) - 128) < 8
