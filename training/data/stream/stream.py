"""The samples of shards as the trainer sees them: what belongs to them, and in which order."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from dmp_common import PatchError
from dmp_common.errors import file_error
from dmp_common.patch.serialize import parse_json
from training.data import draws
from training.data.captions.texts import (
    COLUMNS,
    caption_lines,
    caption_value,
    captions_of,
    decoded,
)
from training.data.images import BrokenImageError, upright_size
from training.data.items import Item, Recipe
from training.data.kind import DataKind
from training.data.samples import Sample, Subset
from training.data.sizes import Size
from training.data.stream.lanes import Visit, count_of, pooled, visit_samples, visits
from training.data.stream.shards import Counts, Raw, Shard
from training.options.data_options import DataOptions

_EMPTY = 64  # passes over all data without an image, after which there are none


class BytesStore:
    """Images that came with their sample: a place is a name and bytes."""

    def open(self, place: tuple[str, bytes]) -> BinaryIO:
        """The image."""
        return io.BytesIO(place[1])

    def name(self, place: tuple[str, bytes]) -> str:
        """Shard and sample."""
        return place[0]

    def fingerprint(self, place: tuple[str, bytes]) -> str:
        """Never cached."""
        raise io.UnsupportedOperation("streams are not cached")

    def stamp(self, place: tuple[str, bytes]) -> str:
        """Never remembered."""
        raise io.UnsupportedOperation("streams are not read before the run")


@dataclass(frozen=True)
class Stream:
    """What a worker needs to know.

    Args:
        shards: of this split.
        recipe: from samples to batches.
        pool: images among which the next is drawn, over all lanes.
        counts_folder: where counts of remote shards are kept.
        buckets: sizes to draw a batch's size from, one for each image that was looked at; empty
            where all batches have one size.
    """

    shards: tuple[Shard, ...]
    subset: Subset
    recipe: Recipe
    options: Any
    pool: int
    counts_folder: Path | None = None
    buckets: tuple[Size, ...] = ()

    def bucket(self, batch: int) -> Size | None:
        """The size of a global batch, which all lanes know without asking."""
        if not self.buckets:
            return None
        return self.buckets[draws.below(len(self.buckets), self.recipe.seed, batch, "bucket")]

    def lane(self, lane: int, lanes: int, each: int, start: int) -> Iterator[list[Item]]:
        """The items of a lane, `each` to a batch, from global batch `start` on."""
        counts = Counts(self.counts_folder)
        items = self._items(lane, lanes, each, start * each, counts)
        while True:
            yield list(itertools.islice(items, each))

    def _items(self, lane: int, lanes: int, each: int, skip: int, counts: Counts) -> Iterator[Item]:
        number, empty = 0, 0  # items of the lane so far; visits in a row without any
        seed, shuffle = self.recipe.seed, self.recipe.augment
        for visit in visits(self.shards, lane, lanes, seed, shuffle):
            first = number
            if number < skip:
                count = count_of(visit, counts)
                if number + count <= skip:
                    number += count
                    continue
            for item in self._of_visit(visit, lanes, each, number, counts):
                number += 1
                if number > skip:
                    yield item
            empty = empty + 1 if number == first else 0
            if empty > _EMPTY * len(self.shards) * visit.parts:
                raise PatchError(
                    f"expected images in the {len(self.shards)} shards, found none any more: check "
                    "--webdataset."
                )

    def _of_visit(
        self, visit: Visit, lanes: int, each: int, first: int, counts: Counts
    ) -> Iterator[Item]:
        def pick(pool: Sequence[Item], taken: int) -> int:
            bucket = self.bucket((first + taken) // each)
            draw = (self.recipe.seed, visit.epoch, visit.shard.name, visit.part, taken)
            if bucket is None:
                return draws.below(len(pool), *draw) if self.recipe.augment else 0
            ratio = math.log(bucket[0] / bucket[1])
            away = [abs(math.log(i.sample.size[0] / i.sample.size[1]) - ratio) for i in pool]
            near = [n for n, distance in enumerate(away) if distance <= min(away) + 1e-9]
            return near[draws.below(len(near), *draw)]

        size = max(1, self.pool // lanes) if self.recipe.augment or self.buckets else 1
        raws = visit_samples(visit, counts)
        items = (self.item(raw, visit) for raw in raws)
        for taken, item in enumerate(pooled(items, size, pick)):
            bucket = self.bucket((first + taken) // each)
            yield replace(item, sample=replace(item.sample, bucket=bucket)) if bucket else item

    def item(self, raw: Raw, visit: Visit) -> Item:
        """A sample with what goes with it; `fault` says why it cannot be used.

        Raises:
            PatchError: it has no caption or class, and the options do not allow to skip it.
        """
        name = f"{visit.shard.place}!{raw.key}"
        key = f"{visit.shard.name}!{raw.key}"
        # An image that cannot be used keeps its place, so that a resumed run finds its own.
        captions: tuple[str, ...] = ()
        label: int | None = self.recipe.kind.null_label or 0
        fault = ""
        size = self.subset.sizes.resolution
        try:
            captions, label = describe(raw, name, self.recipe.kind, self.subset, self.options)
            size = upright_size(io.BytesIO(raw.image), name)
        except BrokenImageError as error:
            fault = str(error)
        except PatchError as error:
            if not self.options.skip_broken:
                raise
            fault = str(error)
        sample = Sample(key, (name, raw.image), size, self.subset, captions, label, fault=fault)
        return Item(sample, visit.epoch)


def describe(
    raw: Raw, name: str, kind: DataKind, subset: Subset, options: DataOptions
) -> tuple[tuple[str, ...], int | None]:
    """Captions and label of a sample, from .txt, .caption, .json and .cls.

    Raises:
        PatchError: what the base needs is not there, or not understood.
    """
    try:
        about = parse_json(decoded(raw.parts["json"])) if "json" in raw.parts else {}
        about = about if isinstance(about, dict) else {}
        if kind.conditioning == "label":
            value = decoded(raw.parts["cls"]) if "cls" in raw.parts else about.get("label")
            if value is None:
                raise PatchError(
                    f"expected a class in {name} (.cls, or label in .json), found none: add it, or "
                    "give --skip_broken."
                )
            return (), _checked_label(int(value), name, kind)
        if kind.conditioning == "none":
            return (), None
        text = next((decoded(raw.parts[e], options.caption_encoding)
                     for e in ("txt", "caption", "text") if e in raw.parts), None)  # fmt: skip
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, PatchError):
            raise
        expected = "text, JSON or a number"
        raise file_error(name, expected, error, "correct or remove this sample") from error
    if text is not None:
        lines = caption_lines(text)
        captions = lines if subset.captions.enable_wildcard else lines[:1]
    else:
        names = (options.caption_column,) if options.caption_column else COLUMNS
        value = caption_value(about, None, name, names)
        captions = captions_of(str(value) if isinstance(value, int | float) else value, name)
    bare = not any(captions) and not subset.captions.class_tokens
    if bare and not options.allow_empty_captions:
        raise PatchError(
            f"expected a caption in {name} (.txt, or caption in .json), found none: give "
            "--caption_column, --class_tokens, --allow_empty_captions, or --skip_broken to leave "
            "such images out; files of one sample must stand next to each other in the shard."
        )
    return captions, None


def _checked_label(label: int, name: str, kind: DataKind) -> int:
    if label < 0 or (kind.num_classes is not None and label >= kind.num_classes):
        raise PatchError(
            f"expected a class id below {kind.num_classes} in {name}, found {label}: check the "
            "shards and the base."
        )
    return label
