"""What the trainer reads: batches, positions, and the interface of every source of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

# What is done, how many are done, how many there are.
Progress = Callable[[str, int, int], None]


class Position(NamedTuple):
    """The next global batch: its epoch and its place in it."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, B images of one size.

    Args:
        keys: B unique, readable names: paths relative to the data folder, or shard!sample.
        sizes: (B, 6) int64: original height and width, top and left of the crop, target height
            and width, as SDXL's time ids; crops count pixels of the resized image.
        next: the position after this batch, to resume from.
        pixels: (B, C, H, W) float32 in [-1, 1]; None with cached latents.
        moments: (B, 2C, h, w) float32, means and then standard deviations; None without cache.
        captions: B texts as they are to be encoded; None with cached text or without captions.
        text: cached outputs of the text encoders, each (B, ...).
        labels: (B,) int64 class ids, dropped ones are the null label.
        weights: (B,) float32 factors of the loss, None if all are 1. Validation gives 0 to the
            images that only fill up a batch, so that every image counts once.
        masks: (B, 1, H, W) float32 in [0, 1], how much each pixel counts in the loss, at the size
            of the pixels; None for data without masks.
    """

    keys: list[str]
    sizes: Tensor
    next: Position
    pixels: Tensor | None = None
    moments: Tensor | None = None
    captions: list[str] | None = None
    text: dict[str, Tensor] | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        text = self.text and {name: value.to(device) for name, value in self.text.items()}
        return replace(
            self,
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            pixels=moved(self.pixels),
            moments=moved(self.moments),
            labels=moved(self.labels),
            weights=moved(self.weights),
            masks=moved(self.masks),
            text=text,
        )


@dataclass(frozen=True)
class BucketRow:
    """One line of the bucket table: `items` counts images with their repeats."""

    width: int
    height: int
    images: int
    items: int


@dataclass(frozen=True)
class SubsetRow:
    """One line of the table of subsets."""

    name: str
    images: int
    repeats: int


@dataclass(frozen=True)
class DataSummary:
    """What a dry run tells of the data.

    Args:
        source: where the data is from, in words.
        images: different images in this split; None where a stream does not know.
        items: images with repeats in one epoch.
        captioned, uncaptioned: images with and without a caption of their own.
        classes: images of each class, by name.
        buckets: sizes and how many images have them.
        subsets: folders with their repeats.
        cropped: mean share of an image's area that is cut off.
        notes: what the user should know, a sentence each.
    """

    source: str
    images: int | None
    items: int | None
    captioned: int = 0
    uncaptioned: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    buckets: list[BucketRow] = field(default_factory=list)
    subsets: list[SubsetRow] = field(default_factory=list)
    cropped: float = 0.0
    notes: list[str] = field(default_factory=list)

    def batches_per_epoch(self, global_batch: int) -> int | None:
        """Global batches of an epoch; a bucket's last one is filled up, not dropped."""
        if self.items is None:
            return None
        if not self.buckets:
            return -(-self.items // global_batch)
        return sum(-(-row.items // global_batch) for row in self.buckets)

    def filled(self, global_batch: int) -> int:
        """Images seen once more in an epoch, to fill up the last batch of a bucket."""
        return sum(-row.items % global_batch for row in self.buckets)

    def text(self, global_batch: int) -> str:
        """The summary as a user reads it."""
        known = f"{self.images:,} images" if self.images is not None else "images: not counted"
        lines = [f"data: {self.source}: {known}"]
        if self.items is not None:
            if self.items != self.images:
                lines.append(f"with repeats: {self.items:,}")
            lines.append(
                f"steps per epoch: {self.batches_per_epoch(global_batch):,} of batch "
                f"{global_batch} ({self.filled(global_batch):,} images seen twice to fill batches)"
            )
        if self.captioned or self.uncaptioned:
            lines.append(f"captions: {self.captioned:,} images with, {self.uncaptioned:,} without")
        if self.classes:
            counts = sorted(self.classes.values())
            lines.append(f"classes: {len(counts):,}, of {counts[0]:,} to {counts[-1]:,} images")
        if len(self.subsets) > 1 or any(row.repeats != 1 for row in self.subsets):
            lines += [f"  {r.name}: {r.images:,} images x {r.repeats}" for r in self.subsets]
        if self.buckets:
            lines += ["buckets (width x height: images, with repeats):"]
            lines += [f"  {r.width}x{r.height}: {r.images:,}, {r.items:,}" for r in self.buckets]
            lines.append(f"cut off on average: {self.cropped:.1%} of an image")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class Data(ABC):
    """One split of a data set. Every source gives this interface."""

    size: int | None  # images with repeats in an epoch; None where a stream does not know

    @abstractmethod
    def summary(self) -> DataSummary:
        """What a dry run shows."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when other images, captions or labels are trained on, wherever they lie."""

    @abstractmethod
    def prepare_caches(
        self, rank: int = 0, world: int = 1, progress: Progress | None = None
    ) -> None:
        """Fills the caches that the options ask for; does nothing where they ask for none.

        On disk each of `world` processes makes its share: let all of them finish (a barrier)
        before the first calls `batches`. In memory each process makes everything.

        Raises:
            PatchError: an image that does not decode, a full disk, an unwritable folder.
        """

    @abstractmethod
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
        """Batches without end, epoch after epoch, from `start` on.

        A global batch is of one size; the rank gets its contiguous share of it. What is in it
        depends on the seed, the position and the global batch size alone.

        Raises:
            PatchError: a batch size that the processes cannot share, or an image that does not
                decode.
        """

    def batches_per_epoch(self, global_batch: int) -> int | None:
        """Global batches of an epoch, None where a stream does not know."""
        return self.summary().batches_per_epoch(global_batch)
