"""From a list of items to a batch: what a data worker does."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmp_common import PatchError
from training.data import draws
from training.data.augment import vary_color
from training.data.batch import Batch, Position
from training.data.captions.caption_rules import caption_text, is_dropped
from training.data.images import open_image, to_tensor
from training.data.kind import DataKind
from training.data.samples import Sample, Store, TensorStore
from training.data.sizes import crop_and_resize, fit


@dataclass(frozen=True)
class Item:
    """One image in one epoch; `repeat` counts its repeats from 0."""

    sample: Sample
    epoch: int
    repeat: int = 0
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What random draws hang on: each repeat of an image has its own."""
        return f"{self.sample.key}#{self.repeat}" if self.repeat else self.sample.key


@dataclass(frozen=True)
class Request:
    """The items of a batch and the position after it."""

    items: list[Item]
    next: Position


@dataclass(frozen=True)
class Recipe:
    """How items become tensors.

    Args:
        kind: what the base eats.
        seed: of all draws.
        augment: training; validation mirrors, drops and shuffles nothing.
        latents, texts: caches that are ready, or None.
        skip_broken: an image that does not decode becomes grey with weight 0, not an error. So
            the others of the batch are the same, whichever process finds it.
    """

    kind: DataKind
    store: Store | TensorStore
    seed: int
    augment: bool
    latents: Any = None
    texts: Any = None
    skip_broken: bool = False

    def batch(self, request: Request) -> Batch:
        """Loads and stacks items of one size.

        Raises:
            PatchError: an image does not decode, or its cache file is damaged.
        """
        images, sizes, weights = zip(*(self._weighted(i) for i in request.items), strict=True)
        stacked, weight = torch.stack(images), torch.tensor(weights)
        captions, labels = None, None
        if self.kind.conditioning == "label":
            labels = torch.tensor([self._label(item) for item in request.items])
        elif self.kind.conditioning == "caption":
            captions = [self._caption(item) for item in request.items]
        batch = Batch(
            keys=[item.sample.key for item in request.items],
            sizes=torch.tensor(sizes),
            next=request.next,
            pixels=stacked if self.latents is None else None,
            moments=stacked if self.latents is not None else None,
            captions=captions,
            labels=labels,
            weights=None if bool((weight == 1).all()) else weight,
        )
        return batch if self.texts is None else with_texts(batch, self.texts)

    def _weighted(self, item: Item) -> tuple[Tensor, tuple[int, ...], float]:
        try:
            return *self.image(item), item.weight
        except PatchError as error:
            if not self.skip_broken:
                raise
            print(f"skipped: {error}", file=sys.stderr)
        width, height = fit(item.sample.size, item.sample.subset.sizes, item.sample.bucket).target
        return torch.zeros(self.kind.channels, height, width), (0, 0, 0, 0, height, width), 0.0

    def image(self, item: Item) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels (C, H, W) or moments (2C, h, w), and the row of `Batch.sizes`."""
        sample, rules = item.sample, item.sample.subset.sizes
        draw = (self.seed, item.epoch, item.name)
        flipped = self.augment and rules.flip and draws.uniform(*draw, "flip") < 0.5
        at = None
        if self.augment and rules.random_crop:
            at = draws.uniform(*draw, "crop x"), draws.uniform(*draw, "crop y")
        how = fit(sample.size, rules, sample.bucket)
        left, top = how.crop(at)
        # SDXL's crop is that of the picture as it is shown: mirrored, it starts at the other side.
        shown = how.resized[0] - how.target[0] - left if flipped else left
        row = (*reversed(sample.size), top, shown, *reversed(how.target))
        if self.latents is not None:
            return self.latents.moments(sample, flipped), row
        pixels = self.pixels(sample, left, top)
        if self.augment and rules.color:
            pixels = vary_color(pixels, *draw)
        return pixels.flip(-1) if flipped else pixels, row

    def pixels(self, sample: Sample, left: int, top: int) -> Tensor:
        """Pixels (C, H, W) of a sample, cropped at `left` and `top` of the resized image."""
        if isinstance(self.store, TensorStore):
            return self.store.images[sample.place]
        name = self.store.name(sample.place)
        with self.store.open(sample.place) as file:
            image = open_image(file, name, self.kind.channels)
        if image.size != sample.size:
            raise PatchError(
                f"expected {name} with {sample.size[0]} x {sample.size[1]} pixels, as it had at "
                f"the start, found {image.width} x {image.height}: start again with data that "
                "does not change."
            )
        how = fit(sample.size, sample.subset.sizes, sample.bucket)
        return to_tensor(crop_and_resize(image, how, left, top))

    def _label(self, item: Item) -> int:
        rules = item.sample.subset.captions
        if self.augment and is_dropped(rules, self.seed, item.epoch, item.name):
            assert self.kind.null_label is not None, "open_data checked it"
            return self.kind.null_label
        assert item.sample.label is not None, "open_data checked it"
        return item.sample.label

    def _caption(self, item: Item) -> str:
        rules = item.sample.subset.captions
        epoch = item.epoch if self.augment else 0
        if self.augment and is_dropped(rules, self.seed, epoch, item.name):
            return ""
        return caption_text(item.sample.captions, rules, self.seed, epoch, item.name)


def with_texts(batch: Batch, texts: Any) -> Batch:
    """The batch with cached outputs in place of its captions."""
    assert batch.captions is not None, "open_data checked it"
    return replace(batch, captions=None, text=texts.stacked(batch.captions))


class _Loading(Dataset[Any]):
    """A function of requests, in whichever process. An error travels as a value.

    Raised in a worker, it would reach the user inside a traceback of the worker.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._function(request)
        except PatchError as error:
            return error


def load(requests: Iterable[Any], function: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """What `function` makes of each request, in their order, ahead of time by `workers` processes.

    Raises:
        PatchError: as the function does.
    """
    loader: DataLoader[Any] = DataLoader(
        _Loading(function), sampler=_Once(requests), batch_size=None, num_workers=workers,
        collate_fn=_as_it_is, generator=own_generator(),
    )  # fmt: skip
    yield from unpacked(loader)


def own_generator() -> torch.Generator:
    """For a loader to draw its workers' seed from: torch's global one is the trainer's."""
    return torch.Generator().manual_seed(0)


def ahead(batches: Iterator[Any], count: int = 2) -> Iterator[Any]:
    """The same batches, without end, `count` of them ahead of time in a thread.

    Reading files and decoding images let go of Python's lock, so they run beside the step.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches) for _ in range(count))
        while True:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(next, batches))
            yield batch


def unpacked(results: Iterable[Any]) -> Iterator[Any]:
    """The results of a loader; raises the error that a worker returned."""
    for result in results:
        if isinstance(result, PatchError):
            raise result
        yield result


class _Once:
    """An iterable as a sampler: torch asks a sampler for its length, where it has one."""

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


def _as_it_is(value: Any) -> Any:
    return value
