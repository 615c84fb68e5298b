"""Captions or class ids without pictures, for objectives that draw their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.errors import file_error
from training.data import draws
from training.data.batch import Batch, Data, Position
from training.data.captions.texts import read_text
from training.data.kind import DataKind
from training.data.order import Order, share
from training.data.rules import parse_resolution
from training.data.splitting import validation_rank
from training.data.summary import DataSummary
from training.options.data_options import DataOptions

_FEWEST = 40  # lines of which some are held out; of fewer, all serve both ends
_HELD_OUT = 32  # pictures of a validation then


class CaptionData(Data):
    """One split of lines of text, each a caption or a class id.

    Args:
        lines: of this split, which may repeat.
        kind: of the base.
        size: width and height of the pictures that are drawn.
        seed: of order and dropout.
        dropout: the share of lines that become the empty caption or the null class.
        shuffled: for training; a validation keeps the order of the lines.
        source: in words, for the summary.

    Attributes:
        pictures: what was drawn for each key: pixels (C, H, W), or moments (2C, h, w) of a base
            with a VAE; empty before.
        drawn: "pixels" or "moments".
    """

    def __init__(
        self,
        lines: Sequence[str],
        kind: DataKind,
        size: tuple[int, int],
        seed: int,
        dropout: float,
        shuffled: bool,
        source: str,
    ) -> None:
        self.lines, self._kind, self._image = list(lines), kind, size
        self._seed, self._dropout, self._source = seed, dropout, source
        self._shuffled, self.size = shuffled, len(lines)
        self._order = Order([0] * len(lines), seed, shuffled)
        self.pictures: Mapping[str, Tensor] = {}
        self.drawn = "pixels"

    def summary(self) -> DataSummary:
        """How many lines there are."""
        return DataSummary(self._source, images=self.size, items=self.size)

    def fingerprint(self) -> str:
        """Of the lines and the size of the pictures."""
        frames = [] if self._kind.frames == 1 else [f"{self._kind.frames} frames"]
        text = "\n".join([str(self._image), *frames, *self.lines])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

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
        fills = None if self._shuffled else self._order.fills(global_batch, world)
        for position in self._order.positions(start, global_batch, world):
            row = self._order.plan(position.epoch, global_batch, world)[position.batch]
            places = share(len(row), rank, world)
            numbers = [int(number) for number in row[places]]
            weights = None
            if fills is not None:
                weights = torch.from_numpy(1.0 - fills[position.batch][places]).float()
            after = self._order.after(position, global_batch, world)
            yield self._batch(numbers, position.epoch, after, weights)

    def _batch(
        self, numbers: list[int], epoch: int, after: Position, weights: Tensor | None
    ) -> Batch:
        keys = [f"line {number + 1}" for number in numbers]
        dropped = [draws.uniform(self._seed, epoch, key, "dropout") < self._dropout for key in keys]
        labelled = self._kind.conditioning == "label"
        width, height = self._image
        drawn = torch.stack([self.pictures[key] for key in keys]) if self.pictures else None
        return Batch(
            keys=keys,
            sizes=torch.tensor([[height, width, 0, 0, height, width]] * len(keys)),
            next=after,
            pixels=drawn if self.drawn == "pixels" else None,
            moments=drawn if self.drawn == "moments" else None,
            captions=None if labelled else [
                "" if gone else self.lines[number]
                for number, gone in zip(numbers, dropped, strict=True)
            ],
            labels=self._labels(numbers, dropped) if labelled else None,
            weights=weights,
        )  # fmt: skip

    def _labels(self, numbers: list[int], dropped: list[bool]) -> Tensor:
        null = int(self._kind.null_label or 0)
        pairs = zip(numbers, dropped, strict=True)
        return torch.tensor([null if gone else int(self.lines[n]) for n, gone in pairs])


def open_captions(
    options: DataOptions, file: str | None, kind: DataKind, seed: int
) -> tuple[CaptionData, CaptionData]:
    """The lines to train on, and those that are held out.

    Args:
        options: resolution and dropout.
        file: of lines; None for all classes of the base.
        kind: what the base needs.
        seed: of order and dropout.

    Raises:
        PatchError: no lines, or one that is no class of the base; or a base of captions without a
            file.
    """
    lines, source = _lines(file, kind)
    size = parse_resolution(options.resolution) or (kind.resolution, kind.resolution)
    size = size[0] // kind.multiple * kind.multiple, size[1] // kind.multiple * kind.multiple
    if min(size) == 0:
        raise PatchError(
            f"expected a resolution of at least {kind.multiple} pixels, found "
            f"{options.resolution}: raise --resolution."
        )
    kept, held = lines, [lines[n % len(lines)] for n in range(_HELD_OUT)]
    if len(lines) >= _FEWEST:
        ordered = sorted(lines, key=lambda line: validation_rank(line, options.validation_seed))
        held = ordered[: max(8, min(64, len(lines) // 20))]
        kept = [line for line in lines if line not in set(held)]
    given = kind, size, seed
    return (
        CaptionData(kept, *given, options.caption_dropout_rate, True, source),
        CaptionData(held, *given, 0.0, False, source),
    )


def _lines(file: str | None, kind: DataKind) -> tuple[list[str], str]:
    if kind.conditioning == "none":
        return ["no condition"], "a base without conditions"
    if file is None and kind.conditioning == "label" and kind.num_classes:
        return [str(label) for label in range(kind.num_classes)], "all classes of the base"
    if file is None:
        raise PatchError(
            "expected --state_captions, a text file with one caption on each line, or training "
            "data, found neither: give one of them."
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise PatchError(
            f"expected a text file for --state_captions, found none at {file}: check the path."
        )
    lines = [line.strip() for line in read_text(path, "utf-8").splitlines() if line.strip()]
    if not lines:
        raise file_error(path, "captions, one on each line", "none", "write some")
    if kind.conditioning == "label":
        limit = kind.num_classes or 0
        bad = [line for line in lines if not (line.isdecimal() and int(line) < limit)]
        if bad:
            raise file_error(
                path, f"class ids below {limit}", ", ".join(bad[:3]), "correct these lines"
            )
    return lines, path.name
