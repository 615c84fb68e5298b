"""What was found in the data: the summary that stands at the start of every run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BucketRow:
    """One line of the bucket table.

    Args:
        width, height: of the images as they are trained.
        images: different images.
        items: images with their repeats.
        batch: images of one process and step, where the data set sets it by itself.
    """

    width: int
    height: int
    images: int
    items: int
    batch: int | None = None

    def batches(self, global_batch: int, world: int) -> tuple[int, int]:
        """Global batches of an epoch, and images that fill up the last one."""
        size = global_batch if self.batch is None else self.batch * world
        return -(-self.items // size), -self.items % size


@dataclass(frozen=True)
class SubsetRow:
    """One line of the table of subsets."""

    name: str
    images: int
    repeats: int


@dataclass(frozen=True)
class Skipped:
    """One line of what is left out: how many, and the reason in words with the first names."""

    count: int
    text: str


@dataclass(frozen=True)
class CaptionCounts:
    """Captions of the images of a split.

    Args:
        found: images with a caption of their own.
        missing: images without any, which the base takes no caption for, or the default one.
        empty: images whose caption is empty or only spaces.
        cut: images with a caption that is longer than the text encoders read.
    """

    found: int = 0
    missing: int = 0
    empty: int = 0
    cut: int = 0

    def text(self) -> str:
        """The counts that are not zero."""
        rest = {"missing": self.missing, "empty": self.empty}
        parts = [f"{count:,} {name}" for name, count in rest.items() if count]
        if self.cut:
            parts.append(f"at least {self.cut:,} longer than the text encoders read")
        return ", ".join([f"{self.found:,} images with", *parts])


@dataclass(frozen=True)
class DataSummary:
    """What was found in the data, for the start of a run and for the dry run.

    Args:
        source: where the data is from, in words.
        images: different images in this split; None where a stream does not know.
        items: images with repeats in one epoch.
        captions: of the images; None for a base without.
        classes: images of each class, by name.
        buckets: sizes and how many images have them.
        subsets: folders with their repeats.
        cropped: mean share of an image's area that is cut off.
        skipped: what was left out, by reason.
        notes: what the user should know, a sentence each.
    """

    source: str
    images: int | None
    items: int | None
    captions: CaptionCounts | None = None
    classes: dict[str, int] = field(default_factory=dict)
    buckets: list[BucketRow] = field(default_factory=list)
    subsets: list[SubsetRow] = field(default_factory=list)
    cropped: float = 0.0
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def batches_per_epoch(self, global_batch: int, world: int = 1) -> int | None:
        """Global batches of an epoch; a bucket's last one is filled up, not dropped.

        Args:
            global_batch: images of a step, for all data sets that do not say it themselves.
            world: processes, for those that do.
        """
        if self.items is None:
            return None
        if not self.buckets:
            return -(-self.items // global_batch)
        return sum(row.batches(global_batch, world)[0] for row in self.buckets)

    def filled(self, global_batch: int, world: int = 1) -> int:
        """Images seen once more in an epoch, to fill up the last batch of a bucket."""
        return sum(row.batches(global_batch, world)[1] for row in self.buckets)

    def text(self, global_batch: int, world: int = 1) -> str:
        """The summary as a user reads it; counts of zero are left out."""
        known = f"{self.images:,} images" if self.images is not None else "images: not counted"
        lines = [f"data: {self.source}: {known}"]
        lines += [f"skipped: {entry.text}" for entry in self.skipped]
        if self.items is not None:
            lines += self._epoch(global_batch, world)
        if self.captions is not None:
            lines.append(f"captions: {self.captions.text()}")
        if self.classes:
            counts = sorted(self.classes.values())
            lines.append(f"classes: {len(counts):,}, of {counts[0]:,} to {counts[-1]:,} images")
        if len(self.subsets) > 1 or any(row.repeats != 1 for row in self.subsets):
            lines += [f"  {r.name}: {r.images:,} images x {r.repeats}" for r in self.subsets]
        if self.buckets:
            lines += ["buckets (width x height: images, with repeats):"]
            lines += [f"  {r.width}x{r.height}: {r.images:,}, {r.items:,}" for r in self.buckets]
        if self.cropped >= 0.0005:
            lines.append(f"cut off on average: {self.cropped:.1%} of an image")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _epoch(self, global_batch: int, world: int) -> list[str]:
        lines = []
        if self.items != self.images:
            lines.append(f"with repeats: {self.items:,}")
        own = sorted({row.batch * world for row in self.buckets if row.batch is not None})
        sizes = own if all(row.batch is not None for row in self.buckets) and own else []
        sizes = sizes or sorted({global_batch, *own})
        filled = self.filled(global_batch, world)
        more = f" ({filled:,} images seen twice to fill batches)" if filled else ""
        lines.append(
            f"steps per epoch: {self.batches_per_epoch(global_batch, world):,} of batch "
            f"{' and '.join(map(str, sizes))}{more}"
        )
        return lines
