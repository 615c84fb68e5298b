"""Data whose images are all known at the start: folders, dataset files, Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby

import numpy as np

from training.data.batch import Batch, Data, Position, Progress
from training.data.caching.caches import Caches
from training.data.caching.encoding import Encoders
from training.data.caching.plan import CachePlan
from training.data.captions.caption_notes import caption_counts, caption_notes
from training.data.faults import Faults
from training.data.items import Item, Recipe, Request, with_texts
from training.data.loader import ahead, load
from training.data.order import Order, share
from training.data.samples import Sample, Subset
from training.data.sizes import fit
from training.data.sources.found import Found
from training.data.summary import BucketRow, CaptionCounts, DataSummary, SubsetRow

_LOOKED_AT = 64  # images whose content goes into the fingerprint of the data


class IndexedData(Data):
    """A split of known images.

    Args:
        found: the images of this split; at least one.
        recipe: how they are loaded.
        plan: of the caches of latents and texts that `prepare_caches` makes.
    """

    def __init__(self, found: Found, recipe: Recipe, plan: CachePlan | None = None) -> None:
        self._found, self._recipe, self._plan = found, recipe, plan
        self.samples = found.samples
        self._faults = Faults(found.skips)
        repeats = [s.subset.repeats if recipe.augment else 1 for s in self.samples]
        self._items = np.repeat(np.arange(len(self.samples)), repeats)  # item -> sample
        self._repeats = np.concatenate([np.arange(n) for n in repeats])  # item -> which repeat
        targets = [fit(s.size, s.subset.sizes, s.bucket) for s in self.samples]
        self._buckets = [
            (how.target, self._batch(s)) for s, how in zip(self.samples, targets, strict=True)
        ]
        self._cropped = float(np.mean([how.cropped for how in targets]))
        own = {bucket: bucket[1] for bucket in self._buckets if bucket[1] is not None}
        self._order = Order(
            [self._buckets[n] for n in self._items], recipe.seed, recipe.augment, own
        )
        images, items = Counter(self._buckets), Counter(self._buckets[n] for n in self._items)
        self._rows = [
            BucketRow(*size, images[size, batch], items[size, batch], batch)
            for size, batch in sorted(items, key=lambda bucket: (bucket[0], bucket[1] or 0))
        ]
        self.size = len(self._items)
        self.needs_encoders = plan is not None and plan.wanted

    def _batch(self, sample: Sample) -> int | None:
        """The batch size of a sample's data set; what is only evaluated is read as its reader
        likes."""
        return sample.subset.batch if self._recipe.augment else None

    def batches_per_epoch(self, global_batch: int, world: int = 1) -> int:
        """See `Data.batches_per_epoch`; a run asks for it often."""
        return sum(row.batches(global_batch, world)[0] for row in self._rows)

    @cached_property
    def _about_captions(self) -> tuple[CaptionCounts, list[str]]:
        window = self._recipe.kind.window
        counts = caption_counts(self.samples, self._found.empty, window)
        return counts, caption_notes(self.samples)

    def summary(self) -> DataSummary:
        """Counts of what was found."""
        subsets: Counter[Subset] = Counter(s.subset for s in self.samples)
        classes = Counter(self._class_name(s) for s in self.samples if s.label is not None)
        notes, kind = list(self._found.notes), self._recipe.kind
        if kind.conditioning == "caption":
            notes += self._about_captions[1]
        if self._plan is not None:
            notes += self._plan.notes
        fixed = not kind.square and not any(s.sizes.bucket for s in subsets)
        if fixed and self._cropped > 0.1:
            notes.append(
                f"{self._cropped:.0%} of the pictures is cut off: --enable_bucket keeps shapes"
            )
        return DataSummary(
            source=self._found.source,
            images=len(self.samples),
            items=self.size,
            captions=self._about_captions[0] if kind.conditioning == "caption" else None,
            classes=dict(sorted(classes.items())),
            buckets=self._rows,
            subsets=[
                SubsetRow(s.name, count, s.repeats if self._recipe.augment else 1)
                for s, count in subsets.items()
            ],
            cropped=self._cropped,
            skipped=[*self._found.skips.summary(), *self._faults.summary()],
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
        self,
        encoders: Encoders | None,
        rank: int = 0,
        world: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """See `Data.prepare_caches`."""
        if self._plan is None or not self._plan.wanted:
            return
        if encoders is None:
            raise ValueError("a cache needs encoders")
        caches = Caches(self._plan, encoders, self._faults)
        self.samples, self._recipe = caches.prepared(
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
        if self.needs_encoders and self._recipe.latents is None and self._recipe.texts is None:
            raise RuntimeError("prepare_caches comes before batches")
        share(global_batch, rank, world)  # says at once what cannot be shared
        requests = self._requests(start, global_batch, rank, world)
        return self._faults.counted(self._loaded(requests, workers, persistent))

    def _loaded(
        self, requests: Iterator[Request], workers: int, persistent: bool
    ) -> Iterator[Batch]:
        recipe, texts = self._recipe, self._recipe.texts
        if not workers or recipe.latents is not None:
            # A thread reads cache files faster than processes can hand them over.
            return ahead(load(requests, recipe.batch, 0))
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
        self, start: Position, global_batch: int, rank: int, world: int
    ) -> Iterator[Request]:
        fills = None if self._recipe.augment else self._order.fills(global_batch, world)
        for position in self._order.positions(start, global_batch, world):
            row = self._order.plan(position.epoch, global_batch, world)[position.batch]
            places = share(len(row), rank, world)
            weights = np.ones(places.stop - places.start)
            if fills is not None:
                weights -= fills[position.batch][places]
            items = [
                Item(self.samples[self._items[n]], position.epoch, int(self._repeats[n]), float(w))
                for n, w in zip(row[places], weights, strict=True)
            ]
            yield Request(items, self._order.after(position, global_batch, world))

    def _class_name(self, sample: Sample) -> str:
        names = self._found.classes
        assert sample.label is not None
        return names[sample.label] if names else str(sample.label)
