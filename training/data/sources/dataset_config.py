"""The images of kohya's dataset file; `training/options/dataset_file.py` reads the file itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from training.data.captions.caption_files import CaptionSource, dotted
from training.data.kind import DataKind
from training.data.rules import make_subset, values_of
from training.data.samples import FileStore, Sample
from training.data.skips import Skips
from training.data.sources.folder_samples import Part, add_samples
from training.data.sources.found import Found
from training.data.sources.listing import CACHE, list_images
from training.data.sources.masks import Masks
from training.options.data_options import DataOptions
from training.options.dataset_file import SubsetTable, read_dataset_file


def find_dataset_config(options: DataOptions, kind: DataKind) -> Found:
    """The images of `--dataset_config`.

    Raises:
        PatchError: keys or values that are not understood, no images, or missing captions.
    """
    file = Path(str(options.dataset_config))
    if kind.conditioning == "label":
        raise PatchError(
            "expected a base that takes captions or nothing for --dataset_config, found one that "
            "takes class ids: give --train_data_dir with one folder for each class."
        )
    read = read_dataset_file(file)
    found = Found(str(file), FileStore(), Skips(options), folder=file.parent / CACHE)
    found.notes += read.notes
    for table in read.subsets:
        try:
            _add(found, table, file, options, kind)
        except PatchError as error:
            found.problems.append(error)
    found.samples = _distinct(found.samples)
    return found


def _add(
    found: Found, table: SubsetTable, file: Path, options: DataOptions, kind: DataKind
) -> None:
    values, where = table.values, table.where
    metadata = _path(values.get("metadata_file"), file)
    folder = _path(values.get("image_dir"), file) or (metadata and metadata.parent)
    assert folder is not None, "the reader checked it"
    extension = values.get("caption_extension", options.caption_extension)
    companions = frozenset({dotted(extension).lower()} if extension else ())
    listing = list_images(folder, found.skips, recursive=False, companions=companions)
    if not listing.images:
        raise PatchError(
            f"expected images in {folder}, the image_dir of {where}, found none: folders below it "
            "are subsets of their own."
        )
    repeats = int(values.get("num_repeats", 1))
    if repeats < 1:
        names = [path.name for path in listing.images]
        found.skips.add(f"images of {folder.name}, which has {repeats} repeats", names)
        return
    rules = {**values_of(options), **values}
    masks = Masks.of(_path(values.get("conditioning_data_dir"), file), folder, found)
    subset = make_subset(rules, kind, folder.name, repeats, masked=masks is not None)
    source = CaptionSource(extension, options.caption_column, metadata, options.caption_encoding)
    part = Part(listing, listing.images, file.parent, folder, subset, source, masks)
    add_samples(found, part, kind)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """An image in several subsets, at two resolutions say, gets a key in each."""
    seen: Counter[str] = Counter()
    distinct = []
    for sample in samples:
        seen[sample.key] += 1
        count = seen[sample.key]
        # The validation split is keyed by the image: it must not be on both sides.
        distinct.append(
            sample if count == 1
            else replace(sample, key=f"{sample.key}@{count}", origin=sample.key)
        )  # fmt: skip
    return distinct


def _path(value: Any, file: Path) -> Path | None:
    if not value:
        return None
    path = Path(value).expanduser()
    return path if path.is_absolute() or path.exists() else file.parent / path
