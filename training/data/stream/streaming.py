"""Data from shards that are read front to back, in memory that does not grow."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dmp_common import PatchError
from training.data.batch import Batch, Data, Position
from training.data.faults import Faults
from training.data.items import Item, Recipe, Request
from training.data.kind import DataKind
from training.data.loader import own_generator, unpacked
from training.data.order import share
from training.data.rules import make_subset, values_of
from training.data.sizes import fit
from training.data.skips import Skips, require_few
from training.data.splitting import validation_rank
from training.data.stream import remote
from training.data.stream.lanes import Visit, lane_count, visit_samples
from training.data.stream.shards import Counts, Shard, find_shards
from training.data.stream.stream import BytesStore, Stream
from training.data.summary import BucketRow, DataSummary
from training.options.data_options import DataOptions

_REFERENCE = 256  # images at the start of the data whose shapes stand for those of all
_MANY = 20  # shards of which one can be spared for validation
_COUNTED = 64  # local shards that are counted at the start, so that there are epochs


class StreamData(Data):
    """A split of shards.

    Args:
        stream: what is read.
        source: in words.
        skips: what is left out.
    """

    def __init__(self, stream: Stream, source: str, skips: Skips) -> None:
        self._stream, self._source = stream, source
        self._faults, self._skips = Faults(skips), skips
        local = not any(remote.is_url(shard.place) for shard in stream.shards)
        counts = Counts(stream.counts_folder)
        few = local and len(stream.shards) <= _COUNTED
        # Nothing that a later run may know better: positions are counted in these epochs.
        self.size = sum(counts.of(shard.place) for shard in stream.shards) if few else None
        for place, count in counts.bare.items():
            names = [f"{Path(place).name}: {count}"] if count else []
            skips.add("shards with samples that have no image", names)

    def summary(self) -> DataSummary:
        """What is known without reading the shards."""
        notes, buckets = list[str](), self._stream.buckets
        if self.size is None:
            notes.append("shards are not counted: one endless epoch, give --max_train_steps")
        if buckets:
            shares = sorted((buckets.count(b) / len(buckets), b) for b in set(buckets))[::-1]
            some = ", ".join(f"{w}x{h} {share:.0%}" for share, (w, h) in shares[:8])
            notes.append(
                f"sizes of batches are drawn as the first {len(buckets)} images are: {some}"
            )
        single = self._stream.subset.sizes.resolution
        count = self.size or 0
        return DataSummary(
            source=self._source,
            images=self.size,
            items=self.size,
            buckets=[BucketRow(*single, count, count)] if count and not buckets else [],
            skipped=[*self._skips.summary(), *self._faults.summary()],
            notes=notes,
        )

    def fingerprint(self) -> str:
        """See `Data.fingerprint`; of the names of the shards, and their counts where known."""
        names = sorted(shard.name for shard in self._stream.shards)
        return hashlib.blake2b(repr((names, self.size)).encode(), digest_size=16).hexdigest()

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
        """See `Data.batches`. Workers live as long as the iterator, whatever `persistent` says."""
        places = share(global_batch, rank, world)
        per_epoch = self.batches_per_epoch(global_batch)
        first = start.epoch * (per_epoch or 0) + start.batch
        if start.epoch and per_epoch is None:
            raise PatchError(
                f"expected shards that can be counted to resume at epoch {start.epoch}, found "
                "others: resume with the shards of the interrupted run."
            )
        reader = _Reader(self._stream, global_batch, places, first)
        workers = min(workers, len(reader.lanes))
        loader: DataLoader[Any] = DataLoader(
            reader, batch_size=None, num_workers=workers, generator=own_generator()
        )
        batches = self._joined(unpacked(loader), max(1, workers), first, per_epoch)
        return self._faults.counted(batches)

    def _joined(
        self, parts: Iterator[Batch], count: int, first: int, per_epoch: int | None
    ) -> Iterator[Batch]:
        """Batches from the parts of all workers, which come in turns."""
        for number in itertools.count(first + 1):
            position = Position(*divmod(number, per_epoch)) if per_epoch else Position(0, number)
            yield joined([next(parts) for _ in range(count)], position)


class _Reader(IterableDataset[Any]):
    """This rank's lanes, divided among workers: a part of every batch from each of them."""

    def __init__(self, stream: Stream, global_batch: int, places: slice, first: int) -> None:
        self._stream, self._places, self._first = stream, places, first
        self._count = lane_count(global_batch)
        self._each = global_batch // self._count
        self.lanes = range(places.start // self._each, -(-places.stop // self._each))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        lanes = list(self.lanes)
        if worker is not None:
            lanes = [int(n) for n in np.array_split(lanes, worker.num_workers)[worker.id]]
        try:
            yield from self._batches(lanes)
        except PatchError as error:
            yield error

    def _batches(self, lanes: Sequence[int]) -> Iterator[Batch]:
        readers = [self._stream.lane(n, self._count, self._each, self._first) for n in lanes]
        while True:
            items: list[Item] = []
            for lane, reader in zip(lanes, readers, strict=True):
                mine = range(lane * self._each, (lane + 1) * self._each)
                chosen = zip(mine, next(reader), strict=True)
                items += [i for place, i in chosen
                          if self._places.start <= place < self._places.stop]  # fmt: skip
            yield self._stream.recipe.batch(Request(items, Position()))


def joined(parts: Sequence[Batch], position: Position) -> Batch:
    """One batch of several, in their order."""
    if len(parts) == 1:
        return replace(parts[0], next=position)
    weights = None
    if any(part.weights is not None for part in parts):
        weights = torch.cat([
            torch.ones(len(part)) if part.weights is None else part.weights for part in parts
        ])  # fmt: skip

    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        return (
            torch.cat(values)
            if isinstance(values[0], torch.Tensor)
            else list(itertools.chain(*values))
        )

    return Batch(
        keys=cat("keys"), sizes=cat("sizes"), next=position, pixels=cat("pixels"),
        captions=cat("captions"), labels=cat("labels"), weights=weights, masks=cat("masks"),
        broken={key: error for part in parts for key, error in part.broken.items()},
    )  # fmt: skip


def open_stream(options: DataOptions, kind: DataKind, seed: int, split: str) -> StreamData:
    """The shards of `--webdataset`. Reads the first samples, to find out early what is wrong.

    Raises:
        PatchError: no shards, no images in them, captions or classes that are missing, or
            options that streams cannot serve.
    """
    refused = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs",
               "cache_text_encoder_outputs_to_disk", "bucket_no_upscale",
               "verify_images")  # fmt: skip
    for name in refused:
        if getattr(options, name):
            raise PatchError(
                f"expected no --{name} with --webdataset, found it: shards are read as they come, "
                "without knowing all images; leave it out."
            )
    places = str(options.webdataset)
    shards = _split(find_shards(places), options, split)
    subset = make_subset(values_of(options), kind, "shards")
    recipe = Recipe(kind, BytesStore(), seed, augment=split == "train", masked=subset.alpha_mask)
    folder = Path(options.cache_dir) if options.cache_dir else None
    stream = Stream(tuple(shards), subset, recipe, options, options.shuffle_buffer, folder)
    first = _first(stream, _REFERENCE if subset.sizes.bucket else 1, places)
    if subset.sizes.bucket:
        targets = tuple(fit(item.sample.size, subset.sizes).target for item in first)
        stream = replace(stream, buckets=targets)
    return StreamData(stream, f"{len(shards)} shards ({places})", Skips(options))


def open_stream_splits(
    options: DataOptions, kind: DataKind, seed: int
) -> tuple[StreamData, StreamData | None]:
    """The shards to train on, and those that are held out; None where none is.

    Where no option says how many, one of many shards is held out, and none of few.

    Raises:
        PatchError: see `open_stream`.
    """
    count = len(find_shards(str(options.webdataset)))
    if options.validation_split is None and count >= _MANY:
        options = options.model_copy(update={"validation_split": 1 / count})
    train = open_stream(options, kind, seed, "train")
    if not options.validation_split:
        return train, None
    return train, open_stream(options, kind, seed, "validation")


def _first(stream: Stream, count: int, places: str) -> list[Item]:
    """The first `count` images that can be used, of those that are looked at.

    Raises:
        PatchError: there is none, or more are broken than the options allow.
    """
    visits = (Visit(0, shard, 0, 1) for shard in stream.shards)
    raws = ((raw, visit) for visit in visits for raw in visit_samples(visit, Counts(None)))
    good: list[Item] = []
    bad: list[PatchError] = []
    for raw, visit in itertools.islice(raws, _REFERENCE):
        item = stream.item(raw, visit)
        if item.sample.fault:
            bad.append(PatchError(item.sample.fault))
        else:
            good.append(item)
        if len(good) == count:
            break
    require_few(0, bad, Skips(stream.options).limit)
    if not good and bad:
        raise PatchError(
            f"expected images that can be used in {places}, found none among the first "
            f"{len(bad)}, for example: {bad[0]}"
        )
    if not good:
        raise PatchError(f"expected images in {places}, found none in its shards.")
    return good


def _split(shards: list[Shard], options: DataOptions, split: str) -> list[Shard]:
    """Whole shards for validation, by a hash of their names: others are then never opened."""
    share_ = options.validation_split
    if not share_ or split == "test":
        return shards
    if len(shards) < 2:
        raise PatchError("expected two shards to split, found one: leave out --validation_split.")
    ranked = sorted(shards, key=lambda shard: validation_rank(shard.name, options.validation_seed))
    count = min(max(1, round(share_ * len(shards))), len(shards) - 1)
    chosen = set(ranked[:count])
    return [shard for shard in shards if (shard in chosen) == (split == "validation")]
