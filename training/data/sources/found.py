"""What a source of data found: its images, what it left out, and what it has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dmp_common import PatchError
from training.data.captions.metadata_files import raise_all
from training.data.kind import DataKind
from training.data.samples import Sample, Store, TensorStore
from training.data.skips import Skips
from training.data.sources.scan import short_ones, whole
from training.options.data_options import DataOptions


@dataclass
class Found:
    """What a source found. Several folders add to one.

    Args:
        source: in words.
        store: of the images.
        skips: what is left out.
        samples: the images.
        folder: where cache files go by default; None where there is no such place.
        notes: for the summary.
        hints: sentences that may explain why captions are missing.
        classes: names of the class ids.
        empty: keys of images whose caption is there, but has no text.
        problems: errors that are all to be told at once.
    """

    source: str
    store: Store | TensorStore
    skips: Skips
    samples: list[Sample] = field(default_factory=list)
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    empty: set[str] = field(default_factory=set)
    problems: list[PatchError] = field(default_factory=list)

    def check(self, options: DataOptions, kind: DataKind) -> None:
        """Checks everything that was found, once a source has found all of it.

        Raises:
            PatchError: problems, too many broken images, missing captions, or no images at all.
        """
        raise_all(self.problems)
        if options.verify_images and not isinstance(self.store, TensorStore):
            self._verify(self.store, options)
        self.skips.check()
        if kind.frames > 1 and not isinstance(self.store, TensorStore):
            raise_all(short_ones(self.store, [sample.place for sample in self.samples], kind))
        if kind.conditioning == "caption":
            self._require_captions(options)
        if not self.samples:
            left = "; ".join(entry.text for entry in self.skips.summary())
            raise PatchError(
                f"expected images in {self.source} to train on, found none that can be used"
                + (f": {left}." if left else ".")
            )

    def _verify(self, store: Store, options: DataOptions) -> None:
        cache = Path(options.cache_dir) if options.cache_dir else self.folder
        errors = whole(store, [sample.place for sample in self.samples], cache)
        for number, error in errors.items():
            self.skips.add_broken(self.samples[number].key, error)
        self.samples = [s for n, s in enumerate(self.samples) if n not in errors]

    def _require_captions(self, options: DataOptions) -> None:
        bare = [s for s in self.samples if _is_bare(s)]
        if not bare:
            return
        if options.allow_empty_captions:
            some = _first_keys(bare)
            self.notes.append(f"{len(bare)} images are trained on the empty caption ({some})")
        elif options.skip_broken:
            self.skips.add("images without a caption", [sample.key for sample in bare])
            self.samples = [sample for sample in self.samples if not _is_bare(sample)]
        else:
            hints = "".join(f" {hint}" for hint in self.hints)
            raise PatchError(
                f"expected a caption for every image, found {len(bare)} of {len(self.samples)} "
                f"without one ({_first_keys(bare)}): put a text file of the same name beside each "
                "(photo.jpg, photo.txt), give --class_tokens for all that have none, "
                "--allow_empty_captions to train them on the empty caption, or --skip_broken to "
                f"leave them out.{hints}"
            )


def _is_bare(sample: Sample) -> bool:
    return not any(sample.captions) and not sample.subset.captions.class_tokens


def _first_keys(samples: Sequence[Sample]) -> str:
    return ", ".join(sample.key for sample in samples[:3]) + (", ..." if len(samples) > 3 else "")
