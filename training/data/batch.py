"""What the trainer reads: batches, positions, and the interface of every source of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.caching.encoding import Encoders
from training.data.summary import DataSummary

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
        pixels: (B, C, H, W) float32 in [-1, 1], of videos (B, C, frames, H, W); None with cached
            latents.
        moments: (B, 2C, h, w) float32, means and then standard deviations, of videos
            (B, 2C, T, h, w); None without cache.
        captions: B texts as they are to be encoded; None with cached text or without captions.
        text: cached outputs of the text encoders, each (B, ...).
        first: cached, what the model is told of the first frames of videos, each (B, ...).
        labels: (B,) int64 class ids, dropped ones are the null label.
        weights: (B,) float32 factors of the loss, None if all are 1. Validation gives 0 to the
            images that only fill up a batch, so that every image counts once; images that cannot
            be used have 0, too.
        masks: (B, 1, H, W) float32 in [0, 1], how much each pixel counts in the loss, at the size
            of the pixels; None for data without masks.
        broken: what is wrong with images that cannot be used, by key.
    """

    keys: list[str]
    sizes: Tensor
    next: Position
    pixels: Tensor | None = None
    moments: Tensor | None = None
    captions: list[str] | None = None
    text: dict[str, Tensor] | None = None
    first: dict[str, Tensor] | None = None
    labels: Tensor | None = None
    weights: Tensor | None = None
    masks: Tensor | None = None
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """B."""
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        text = self.text and {name: value.to(device) for name, value in self.text.items()}
        first = self.first and {name: value.to(device) for name, value in self.first.items()}
        return replace(
            self,
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            pixels=moved(self.pixels),
            moments=moved(self.moments),
            labels=moved(self.labels),
            weights=moved(self.weights),
            masks=moved(self.masks),
            text=text,
            first=first,
        )


class Data(ABC):
    """One split of a data set. Every source gives this interface."""

    size: int | None  # images with repeats in an epoch; None where a stream does not know
    needs_encoders = False  # whether `prepare_caches` has to make something

    @abstractmethod
    def summary(self) -> DataSummary:
        """What a dry run shows."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when other images, captions or labels are trained on, wherever they lie."""

    def prepare_caches(  # noqa: B027 (most sources have nothing to prepare)
        self,
        encoders: Encoders | None,
        rank: int = 0,
        world: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Fills the caches that the options ask for; does nothing in a source without caches.

        On disk each of `world` processes makes its share: let all of them finish (a barrier)
        before the first calls `batches`. In memory each process makes everything.

        Args:
            encoders: make what is missing; None only where `needs_encoders` is false.
            rank, world: this process and how many there are.
            progress: is told how far it is.

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
        depends on the seed, the position and the global batch size alone. Batches for training of
        a data set with a batch size of its own have that size times `world` instead.

        Raises:
            PatchError: a batch size that the processes cannot share, or an image that does not
                decode.
        """

    def batches_per_epoch(self, global_batch: int, world: int = 1) -> int | None:
        """Global batches of an epoch, None where a stream does not know."""
        return self.summary().batches_per_epoch(global_batch, world)
