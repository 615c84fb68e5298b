"""Data whose images are all known at the start: folders, dataset files, Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from training.data.batch import (
    Batch,
    BucketRow,
    Data,
    DataSummary,
    Position,
    Progress,
    SubsetRow,
)
from training.data.caching.caches import Caches
from training.data.items import Item, Recipe, Request, ahead, load, with_texts
from training.data.order import Order, share
from training.data.samples import Sample, Subset
from training.data.sizes import fit

_LOOKED_AT = 64  # images whose content goes into the fingerprint of the data


@dataclass
class Found:
    """What a source found: its images, and what it has to say about them.

    Args:
        source: in words.
        folder: where cache files go by default; None where there is no such place.
        notes: for the summary.
        classes: names of the class ids.
    """

    source: str
    samples: list[Sample]
    store: Any
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


class IndexedData(Data):
    """A split of known images.

    Args:
        found: the images of this split; at least one.
        recipe: how they are loaded.
        caches: of latents and texts, made by `prepare_caches`.
    """

    def __init__(self, found: Found, recipe: Recipe, caches: Caches | None = None) -> None:
        self._found, self._recipe, self._caches = found, recipe, caches
        self.samples = found.samples
        repeats = [s.subset.repeats if recipe.augment else 1 for s in self.samples]
        self._items = np.repeat(np.arange(len(self.samples)), repeats)  # item -> sample
        self._repeats = np.concatenate([np.arange(n) for n in repeats])  # item -> which repeat
        targets = [fit(s.size, s.subset.sizes, s.bucket) for s in self.samples]
        self._targets = [how.target for how in targets]
        self._cropped = float(np.mean([how.cropped for how in targets]))
        self._order = Order(
            [self._targets[n] for n in self._items], recipe.seed, shuffle=recipe.augment
        )
        self.size = len(self._items)

    def summary(self) -> DataSummary:
        """Counts of what was found."""
        images, items = Counter(self._targets), Counter(self._targets[n] for n in self._items)
        subsets: Counter[Subset] = Counter(s.subset for s in self.samples)
        captioned = sum(any(s.captions) for s in self.samples)
        asked = self._recipe.kind.conditioning == "caption"
        classes = Counter(self._class_name(s) for s in self.samples if s.label is not None)
        notes = list(self._found.notes)
        fixed = not self._recipe.kind.square and not any(s.sizes.bucket for s in subsets)
        if fixed and self._cropped > 0.1:
            notes.append(
                f"{self._cropped:.0%} of the pictures is cut off: --enable_bucket keeps shapes"
            )
        return DataSummary(
            source=self._found.source,
            images=len(self.samples),
            items=self.size,
            captioned=captioned if asked else 0,
            uncaptioned=len(self.samples) - captioned if asked else 0,
            classes=dict(sorted(classes.items())),
            buckets=[BucketRow(*size, images[size], items[size]) for size in sorted(items)],
            subsets=[
                SubsetRow(s.name, count, s.repeats if self._recipe.augment else 1)
                for s, count in subsets.items()
            ],
            cropped=self._cropped,
            notes=notes,
        )

    def fingerprint(self) -> str:
        """See `Data.fingerprint`; of the contents of `_LOOKED_AT` images at even distances."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            about = (sample.key, sample.size, sample.captions, sample.label, sample.subset.repeats)
            digest.update(repr(about).encode("utf-8", "surrogatepass"))
        store, every = self._recipe.store, max(1, len(self.samples) // _LOOKED_AT)
        for sample in self.samples[::every]:
            digest.update(store.fingerprint(sample.place).encode())
        return digest.hexdigest()

    def prepare_caches(
        self, rank: int = 0, world: int = 1, progress: Progress | None = None
    ) -> None:
        """See `Data.prepare_caches`."""
        if self._caches is not None:
            self.samples, self._recipe = self._caches.prepared(
                self.samples, self._recipe, rank, world, progress
            )

    def batches(
        self,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        start: Position = Position(),  # noqa: B008
        workers: int = 0,
        persistent: bool = False,
    ) -> Iterator[Batch]:
        """See `Data.batches`."""
        if self._caches is not None and self._recipe.latents is self._recipe.texts is None:
            raise RuntimeError("prepare_caches comes before batches")
        places = share(global_batch, rank, world)
        fills = None if self._recipe.augment else self._order.fills(global_batch)

        requests, recipe = self._requests(start, global_batch, places, fills), self._recipe
        if not workers or recipe.latents is not None:
            # A thread reads cache files faster than processes can hand them over.
            return ahead(load(requests, recipe.batch, 0))
        texts = recipe.texts
        if texts is None or texts.cache.folder is not None:
            return self._in_workers(requests, recipe, workers, persistent)
        # What is in memory stays here: each worker would get a copy.
        plain = self._in_workers(requests, replace(recipe, texts=None), workers, persistent)
        return (with_texts(batch, texts) for batch in plain)

    def _in_workers(
        self, requests: Iterator[Request], recipe: Recipe, workers: int, persistent: bool
    ) -> Iterator[Batch]:
        if persistent:
            return load(requests, recipe.batch, workers)
        by_epoch = groupby(requests, lambda request: request.items[0].epoch)
        return chain.from_iterable(load(group, recipe.batch, workers) for _, group in by_epoch)

    def _requests(
        self, start: Position, global_batch: int, places: slice, fills: Any
    ) -> Iterator[Request]:
        for position in self._order.positions(start, global_batch):
            chosen = self._order.plan(position.epoch, global_batch)[position.batch][places]
            weights = np.ones(len(chosen))
            if fills is not None:
                weights -= fills[position.batch][places]
            items = [
                Item(self.samples[self._items[n]], position.epoch, int(self._repeats[n]), float(w))
                for n, w in zip(chosen, weights, strict=True)
            ]
            yield Request(items, self._order.after(position, global_batch))

    def _class_name(self, sample: Sample) -> str:
        names = self._found.classes
        assert sample.label is not None
        return names[sample.label] if names else str(sample.label)
