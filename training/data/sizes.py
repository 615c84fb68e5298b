"""From an image's own size to the size it is trained at: buckets, resize and crop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from dmp_common import PatchError
from training.data.kind import DataKind

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class SizeRules:
    """How images of a subset become one of few sizes.

    Args:
        resolution: width and height of training; their product is a bucket's largest area.
        multiple: sides of buckets are multiples of it.
        bucket: whether there are buckets, or one size for all.
        shortest, longest: sides of buckets.
        no_upscale: images below the largest area keep their size.
        flip, random_crop, color: augmentations.
    """

    resolution: Size
    multiple: int
    bucket: bool = False
    shortest: int = 0
    longest: int = 0
    no_upscale: bool = False
    flip: bool = False
    random_crop: bool = False
    color: bool = False


@dataclass(frozen=True)
class Fit:
    """How one image becomes its bucket's size: resize it, then crop.

    Args:
        target: width and height of the bucket.
        resized: width and height before the crop, at least `target`.
    """

    target: Size
    resized: Size

    @property
    def cropped(self) -> float:
        """Share of the area that is cut off."""
        return 1 - math.prod(self.target) / math.prod(self.resized)

    def crop(self, at: tuple[float, float] | None = None) -> tuple[int, int]:
        """Left and top of the crop: in the middle, or at two numbers in [0, 1)."""
        x, y = at or (0.5, 0.5)
        spare = self.resized[0] - self.target[0], self.resized[1] - self.target[1]
        if at is None:
            return spare[0] // 2, spare[1] // 2
        return int(x * (spare[0] + 1)), int(y * (spare[1] + 1))


@lru_cache(maxsize=4096)
def fit(size: Size, rules: SizeRules, given: Size | None = None) -> Fit:
    """The bucket of an image of `size` (or the one `given` for it). Every image has one."""
    if given is not None:
        return _cover(size, given)
    if not rules.bucket:
        return _cover(size, rules.resolution)
    if rules.no_upscale:
        return _without_upscale(size, rules)
    ratio = math.log(size[0] / size[1])
    buckets = bucket_sizes(rules)
    return _cover(size, min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), b)))


@lru_cache(maxsize=64)
def bucket_sizes(rules: SizeRules) -> tuple[Size, ...]:
    """All buckets: for each width the largest height within the area, and the same upright.

    Kohya's rule. The nearest is chosen by the logarithm of the aspect ratio, so that upright and
    lying images are treated alike; kohya compares the ratios themselves.
    """
    area, step = math.prod(rules.resolution), rules.multiple
    side = int(math.sqrt(area)) // step * step
    sizes = {(side, side)} if rules.shortest <= side <= rules.longest and side else set()
    for width in range(_up(rules.shortest, step), rules.longest + 1, step):
        height = min(rules.longest, area // width) // step * step
        if height >= max(rules.shortest, step):
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def crop_and_resize(
    image: Image.Image,
    how: Fit,
    left: int,
    top: int,
    filter_: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Resizes with antialiasing and crops, in one step.

    Reads only the part of the image that is kept.
    """
    across, down = image.width / how.resized[0], image.height / how.resized[1]
    right, bottom = left + how.target[0], top + how.target[1]
    box = (left * across, top * down, min(right * across, image.width),
           min(bottom * down, image.height))  # fmt: skip
    if image.size == how.target and box == (0, 0, *image.size):
        return image
    return image.resize(how.target, filter_, box=box)


def size_rules(
    kind: DataKind,
    *,
    resolution: Size | None,
    enable_bucket: bool,
    min_bucket_reso: int | None,
    max_bucket_reso: int | None,
    bucket_reso_steps: int | None,
    bucket_no_upscale: bool,
    flip_aug: bool,
    random_crop: bool,
    color_aug: bool,
) -> SizeRules:
    """Rules from options, checked against what the base can take.

    Raises:
        PatchError: sizes the base cannot take, or that contradict each other.
    """
    width, height = resolution or (kind.resolution, kind.resolution)
    step = bucket_reso_steps or kind.multiple
    if step % kind.multiple:
        raise PatchError(
            f"expected bucket_reso_steps as a multiple of {kind.multiple}, which this base needs, "
            f"found {step}: change bucket_reso_steps."
        )
    if kind.square and (enable_bucket or width != height):
        found = "enable_bucket" if enable_bucket else f"{width} x {height}"
        raise PatchError(
            f"expected one square size, which is all this base takes, found {found}: leave out "
            "enable_bucket and give one number as resolution; images are cropped to a square."
        )
    if not enable_bucket and (width % kind.multiple or height % kind.multiple):
        raise PatchError(
            f"expected a resolution in multiples of {kind.multiple}, which this base needs, found "
            f"{width} x {height}: the nearest is {_near(width, kind.multiple)} x "
            f"{_near(height, kind.multiple)}."
        )
    shortest = min_bucket_reso or max(min(width, height) // 2, 1)
    longest = max_bucket_reso or 2 * max(width, height)
    rules = SizeRules((width, height), step if enable_bucket else kind.multiple, enable_bucket,
                      shortest, longest, bucket_no_upscale, flip_aug, random_crop,
                      color_aug)  # fmt: skip
    if enable_bucket and not bucket_no_upscale and not bucket_sizes(rules):
        raise PatchError(
            f"expected a bucket between min_bucket_reso {shortest} and max_bucket_reso {longest} "
            f"in steps of {step} for resolution {width} x {height}, found none: change one of them."
        )
    return rules


def _cover(size: Size, target: Size) -> Fit:
    """Smallest resize that covers the target."""
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = tuple(max(t, round(s * scale)) for s, t in zip(size, target, strict=True))
    return Fit(target, (resized[0], resized[1]))


def _without_upscale(size: Size, rules: SizeRules) -> Fit:
    """The image as it is, or shrunk to the largest area, cut to whole steps."""
    scale = min(1.0, math.sqrt(math.prod(rules.resolution) / math.prod(size)))
    step = rules.multiple
    # An image smaller than one step is the one case that must grow.
    width, height = (max(step, int(s * scale + 1e-6) // step * step) for s in size)
    longest = max(step, math.prod(rules.resolution) // min(width, height) // step * step)
    return _cover(size, (min(width, longest), min(height, longest)))


def _near(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _up(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)
