"""From a list of items to a batch: what a data worker does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmp_common import PatchError
from dmp_common.patch.serialize import open_regular
from training.data import draws
from training.data.augment import vary_color
from training.data.batch import Batch, Position
from training.data.caching.cached import Latents, Texts
from training.data.captions.caption_rules import caption_text, is_dropped
from training.data.images import (
    BrokenImageError,
    opacity,
    open_frames,
    open_image,
    open_mask,
    to_tensor,
)
from training.data.kind import DataKind
from training.data.samples import Sample, Store, TensorStore
from training.data.sizes import Fit, crop_and_resize, fit


@dataclass(frozen=True)
class Item:
    """One image in one epoch; `repeat` counts its repeats from 0."""

    sample: Sample
    epoch: int
    repeat: int = 0
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Random draws are keyed by it: each repeat of an image has its own."""
        return f"{self.sample.key}#{self.repeat}" if self.repeat else self.sample.key


@dataclass(frozen=True)
class Request:
    """The items of a batch and the position after it."""

    items: list[Item]
    next: Position


class _Loaded(NamedTuple):
    """An image or its moments, its row of `Batch.sizes`, its mask, what is wrong with it, and what
    a cache has of its first frame."""

    image: Tensor
    sizes: tuple[int, ...]
    mask: Tensor | None
    broken: str = ""
    first: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Recipe:
    """How items become tensors.

    Args:
        kind: what the base needs.
        store: of the images.
        seed: of all draws.
        augment: training; validation mirrors, drops and shuffles nothing.
        latents, texts: caches that are ready, or None.
        masked: whether batches have masks.
    """

    kind: DataKind
    store: Store | TensorStore
    seed: int
    augment: bool
    latents: Latents | None = None
    texts: Texts | None = None
    masked: bool = False

    def batch(self, request: Request) -> Batch:
        """Loads and stacks items of one size.

        An image that cannot be used becomes grey with weight 0, and is named in `Batch.broken`.
        So the others of the batch are the same, whichever process finds it.

        Raises:
            PatchError: a cache file is damaged.
        """
        loaded = [self._loaded(item) for item in request.items]
        images = torch.stack([one.image for one in loaded])
        weight = torch.tensor([0.0 if o.broken else i.weight
                               for o, i in zip(loaded, request.items, strict=True)])  # fmt: skip
        told = [one.first for one in loaded if one.first is not None]
        first = {name: torch.stack([one[name] for one in told]) for name in (*told, {})[0]}
        captions, labels = None, None
        if self.kind.conditioning == "label":
            labels = torch.tensor([self._label(item) for item in request.items])
        elif self.kind.conditioning == "caption":
            captions = [self._caption(item) for item in request.items]
        batch = Batch(
            keys=[item.sample.key for item in request.items],
            sizes=torch.tensor([one.sizes for one in loaded]),
            next=request.next,
            pixels=images if self.latents is None else None,
            moments=images if self.latents is not None else None,
            captions=captions,
            first=first or None,
            labels=labels,
            weights=None if bool((weight == 1).all()) else weight,
            masks=torch.stack([one.mask for one in loaded if one.mask is not None])
            if self.masked
            else None,
            broken={i.sample.key: o.broken for i, o in zip(request.items, loaded, strict=True)
                    if o.broken},
        )  # fmt: skip
        return batch if self.texts is None else with_texts(batch, self.texts)

    def _loaded(self, item: Item) -> _Loaded:
        if self.latents is None:
            try:
                if item.sample.fault:
                    raise BrokenImageError(item.sample.fault)
                return self._from_image(item)
            except BrokenImageError as error:
                return self._grey(item, str(error))
        how, flipped, _, row = self._view(item)
        cached = self.latents.read(item.sample, flipped)
        mask = None
        if self.masked:
            width, height = how.target
            mask = torch.ones(1, height, width)
            if cached.mask is not None:
                mask = cached.mask.float() / 255
        return _Loaded(cached.moments, row, mask, cached.broken, cached.first)

    def _from_image(self, item: Item) -> _Loaded:
        how, flipped, (left, top), row = self._view(item)
        draw = (self.seed, item.epoch, item.name)
        colored = draw if self.augment and item.sample.subset.sizes.color else None
        pixels = self.pixels(item.sample, left, top, colored)
        mask = None
        if self.masked:
            mask = self.mask(item.sample, left, top)
            if mask is None:
                mask = torch.ones(1, how.target[1], how.target[0])
            mask = mask.flip(-1) if flipped else mask
        return _Loaded(pixels.flip(-1) if flipped else pixels, row, mask)

    def _grey(self, item: Item, error: str) -> _Loaded:
        width, height = self._view(item)[0].target
        image = torch.zeros(self.kind.shape(height, width))
        mask = torch.zeros(1, height, width) if self.masked else None
        return _Loaded(image, (0, 0, 0, 0, height, width), mask, error)

    def _view(self, item: Item) -> tuple[Fit, bool, tuple[int, int], tuple[int, ...]]:
        """Resize, side and crop of an item, and its row of `Batch.sizes`."""
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
        return how, flipped, (left, top), row

    def pixels(
        self, sample: Sample, left: int, top: int, colored: tuple[object, ...] | None = None
    ) -> Tensor:
        """Pixels of a sample, cropped at `left` and `top` of the resized image: (C, H, W), or
        (C, frames, H, W) of a video.

        Args:
            sample: the image.
            left, top: of the crop.
            colored: what the change of its colours is keyed by; None for no change.

        Raises:
            BrokenImageError: the image does not decode, or is another than at the start.
        """
        if isinstance(self.store, TensorStore):
            return self.store.images[sample.place]
        name = self.store.name(sample.place)
        with self._opened(sample.place) as file:
            frames = self._frames(file, name)
        image = frames[0]
        if image.size != sample.size:
            raise PatchError(
                f"expected {name} with {sample.size[0]} x {sample.size[1]} pixels, as it had at "
                f"the start, found {image.width} x {image.height}: start again with data that "
                "does not change."
            )
        how = fit(sample.size, sample.subset.sizes, sample.bucket)
        frames = [crop_and_resize(frame, how, left, top) for frame in frames]
        if colored is not None:
            frames = [vary_color(frame, *colored) for frame in frames]
        if self.kind.frames == 1:
            return to_tensor(frames[0])
        video = torch.stack([to_tensor(frame) for frame in frames], dim=1)
        return video.expand(-1, self.kind.frames, -1, -1)

    def _frames(self, file: BinaryIO, name: str) -> list[Image.Image]:
        """The frames of a video, or the picture alone."""
        kind = self.kind
        if kind.frames == 1:
            return [open_image(file, name, kind.channels)]
        return open_frames(file, name, kind.channels, kind.frames, kind.stills)

    def mask(self, sample: Sample, left: int, top: int) -> Tensor | None:
        """How much each pixel of a sample counts, (1, H, W) in [0, 1]; None where all do.

        Raises:
            BrokenImageError: the mask or the image does not decode.
        """
        if isinstance(self.store, TensorStore):
            return None
        mask = None
        if sample.mask is not None:
            with open_regular(Path(sample.mask), "a mask") as file:
                mask = open_mask(file, sample.mask)
        elif sample.subset.alpha_mask:
            with self._opened(sample.place) as file:
                mask = opacity(file, self.store.name(sample.place))
        if mask is None:
            return None
        how = fit(sample.size, sample.subset.sizes, sample.bucket)
        cropped = crop_and_resize(mask, how, left, top, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(cropped)).float()[None] / 255

    def _opened(self, place: Any) -> BinaryIO:
        assert not isinstance(self.store, TensorStore), "its images are open"
        try:
            return self.store.open(place)
        except PatchError as error:
            raise BrokenImageError(str(error)) from error

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


def with_texts(batch: Batch, texts: Texts) -> Batch:
    """The batch with cached outputs in place of its captions."""
    assert batch.captions is not None, "open_data checked it"
    return replace(batch, captions=None, text=texts.stacked(batch.captions))
