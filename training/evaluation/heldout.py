"""Held-out images, encoded once: for the loss, as conditions of samples, and as a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmp_common import PatchError
from training.base.encoders import FrozenEncoders
from training.base.frozen import FrozenBase
from training.data.batch import Batch, Data, Position
from training.data.build import Split, open_data
from training.evaluation.features import Extractor, Features
from training.objective.inputs import Inputs, encode
from training.options.config import TrainConfig

NAME = "evaluation"  # what its random draws depend on, besides seed and image


@dataclass
class HeldOutImages:
    """Images as the base sees them, on the CPU.

    Args:
        inputs: batches of images of one size, every image once.
        captions: of the images, batch by batch; None for bases without.
    """

    inputs: list[Inputs] = field(default_factory=list)
    captions: list[list[str]] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return sum(len(batch.keys) for batch in self.inputs)

    def conditions(self, count: int) -> Iterator[tuple[list[int], Inputs, list[str] | None]]:
        """Numbers of samples, what they are told, and their captions: the images' own, repeated
        as often as needed."""
        first = 0
        while first < count:
            for number, inputs in enumerate(self.inputs):
                rows = list(range(min(len(inputs.keys), count - first)))
                if not rows:
                    return
                captions = None if self.captions is None else self.captions[number][: len(rows)]
                yield [first + row for row in rows], inputs.rows(rows), captions
                first += len(rows)


def open_split(
    config: TrainConfig, frozen: FrozenBase, encoders: FrozenEncoders, split: Split
) -> Data:
    """A split of the data, for which no option of training counts.

    Raises:
        PatchError: see `open_data`.
    """
    off = {"caption_dropout_rate": 0.0, "flip_aug": False, "random_crop": False}
    return open_data(config.model_copy(update=off), frozen.kind, seed=0, split=split)


def once(data: Data, size: int, workers: int) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of one epoch, each with the rows that were not seen before and are readable."""
    seen: set[str] = set()
    for batch in data.batches(global_batch=size, start=Position(0, 0), workers=workers):
        rows = []
        for row, key in enumerate(batch.keys):
            if key not in seen and (batch.weights is None or batch.weights[row] > 0):
                seen.add(key)
                rows.append(row)
        if rows:
            yield batch, rows
        # A stream that does not know its size has no epochs: it is over when images come again.
        if batch.next.epoch > 0 or not rows:
            return


def read_held_out(
    data: Data,
    encoders: FrozenEncoders,
    config: TrainConfig,
    *,
    images: int | None,
    size: int,
    seed: int,
    device: torch.device,
) -> HeldOutImages:
    """Encodes the first images of a split; every model is then evaluated on these.

    Raises:
        PatchError: fewer than two images.
    """
    held_out = HeldOutImages()
    captions: list[list[str]] = []
    for batch, rows in once(data, size, config.max_data_loader_n_workers):
        kept = rows if images is None else rows[: images - len(held_out)]
        names = [(NAME, seed, key) for key in batch.keys]
        inputs = encode(batch, encoders, config, names, device, held_out=True)
        held_out.inputs.append(inputs.to(torch.device("cpu")).rows(kept))
        if batch.captions is not None:
            captions.append([batch.captions[row] for row in kept])
        if images is not None and len(held_out) >= images:
            break
    if len(held_out) < 2:
        raise PatchError(
            f"expected two held-out images at least, found {len(held_out)}: give more data, or "
            "another --validation_split."
        )
    held_out.captions = captions or None
    return held_out


def reference_features(
    data: Data, extractor: Extractor, *, images: int | None, size: int, workers: int
) -> Features:
    """Features of a split's images.

    Raises:
        PatchError: the extractor does not take them.
    """
    parts: list[Features] = []
    count = 0
    for batch, rows in once(data, size, workers):
        assert batch.pixels is not None, "the evaluation switches caches off"
        kept: Tensor = batch.pixels[rows if images is None else rows[: images - count]]
        parts.append(extractor(kept))
        count += len(kept)
        if images is not None and count >= images:
            break
    return Features.joined(parts)
