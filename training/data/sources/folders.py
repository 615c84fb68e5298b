"""Folders of images: with captions, with repeats in their names, by class, or just images."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from dmp_common import PatchError
from training.data.captions.caption_files import CaptionSource, dotted
from training.data.kind import DataKind
from training.data.rules import make_subset, values_of
from training.data.samples import FileStore, Sample
from training.data.skips import Skips
from training.data.sources.classes import class_ids
from training.data.sources.folder_samples import Part, add_samples, measured, sample_key
from training.data.sources.found import Found
from training.data.sources.listing import CACHE, Listing, list_images
from training.data.sources.masks import Masks
from training.options.data_options import DataOptions

_REPEATS = re.compile(r"(\d+)_(.*)")
_NO_UNDERSCORE = re.compile(r"\d+[^\W\d_].*")
_MOST_REPEATS = 999  # a higher number before _ is a year or a counter


def find_folder(options: DataOptions, kind: DataKind) -> Found:
    """The images of `--train_data_dir`.

    Raises:
        PatchError: no images, or what goes with them is missing.
    """
    folder, notes = _root(Path(str(options.train_data_dir)), kind)
    found = Found(str(folder), FileStore(), Skips(options), folder=folder / CACHE, notes=notes)
    source = source_of(options)
    listing = list_images(folder, found.skips, companions=_companions(source))
    if not listing.images:
        left = "; ".join(entry.text for entry in found.skips.summary())
        raise PatchError(
            f"expected images in {folder}, found none"
            + (f" but {left}" if left else "")
            + ": check --train_data_dir; endings such as .jpg, .png and .webp are looked for, in "
            "all folders below it."
        )
    if kind.conditioning == "label":
        _add_classes(found, listing, options, kind)
        return found
    masks = Masks.of(options.conditioning_data_dir, folder, found)
    # Without captions, `0_airplane` is a name like any other.
    parts = _repeat_folders(folder, found) if kind.conditioning == "caption" else {}
    if parts:
        _add_repeated(found, listing, parts, options, kind, masks)
        return found
    own = _own_repeats(folder, listing, found) if kind.conditioning == "caption" else _Repeats(1)
    values = values_of(options)
    values["class_tokens"] = values["class_tokens"] or own.name
    subset = make_subset(values, kind, folder.name, own.count, masked=masks is not None)
    add_samples(found, Part(listing, listing.images, folder, folder, subset, source, masks), kind)
    return found


def source_of(options: DataOptions) -> CaptionSource:
    """Where captions are, as options say."""
    metadata = Path(options.in_json) if options.in_json else None
    return CaptionSource(
        options.caption_extension, options.caption_column, metadata, options.caption_encoding
    )


def _companions(source: CaptionSource) -> frozenset[str]:
    """Endings of files that belong to the images."""
    return frozenset({dotted(source.extension).lower()} if source.extension else ())


@dataclass(frozen=True)
class _Repeats:
    """What a folder's name says: how often its images are seen, and their default caption."""

    count: int
    name: str | None = None


def _repeats_of(name: str) -> _Repeats | None:
    match = _REPEATS.fullmatch(name)
    if match is None or int(match[1][:9]) > _MOST_REPEATS:
        return None
    return _Repeats(int(match[1]), match[2].strip() or None)


def _root(folder: Path, kind: DataKind) -> tuple[Path, list[str]]:
    """The folder of the images: `img` below the root of a project of kohya's interface."""
    images = folder / "img"
    if kind.conditioning != "caption" or not images.is_dir():
        return folder, []
    below = [path for path in _folders(folder) if not path.name.startswith(".")]
    if any(_repeats_of(path.name) for path in below):
        return folder, []
    if not any(_repeats_of(path.name) for path in _folders(images)):
        return folder, []
    others = [path.name for path in below if path.name != "img"]
    note = f"{folder.name} is the root of a project of kohya's interface: its folder img is trained"
    if others:
        note += f", and nothing in {', '.join(others)}"
    if "reg" in others:
        note += "; a patch needs no regularisation images"
    return images, [note]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _repeat_folders(folder: Path, found: Found) -> dict[Path, _Repeats]:
    """Kohya's folders: `10_name` is seen ten times an epoch, its default caption is `name`."""
    parts: dict[Path, _Repeats] = {}
    counters = []
    for path in _folders(folder):
        repeats = _repeats_of(path.name)
        if repeats is not None:
            parts[path] = repeats
        elif _REPEATS.fullmatch(path.name):
            counters.append(path)
            found.notes.append(
                f"folder {path.name}: its number is taken for a year or a counter, not for repeats"
            )
        elif _NO_UNDERSCORE.fullmatch(path.name):
            hint = f"Folder {path.name} is no folder with repeats; those are named as 10_sks is."
            found.hints.append(hint)
            found.notes.append(hint.rstrip("."))
    if parts:
        parts |= {path: _Repeats(1) for path in counters}
    return parts


def _own_repeats(folder: Path, listing: Listing, found: Found) -> _Repeats:
    """What the name of the folder itself says, where it was given instead of the one above it."""
    own = _repeats_of(folder.absolute().name)
    if own is None or not own.count or any(p.parent != folder for p in listing.images):
        return _Repeats(1)
    default = f" and the default caption {own.name}" if own.name else ""
    found.notes.append(
        f"the name of {folder.absolute().name} gives {own.count} repeats{default}, as it does for "
        "the folders in --train_data_dir"
    )
    return own


def _add_repeated(
    found: Found,
    listing: Listing,
    parts: dict[Path, _Repeats],
    options: DataOptions,
    kind: DataKind,
    masks: Masks | None,
) -> None:
    folder, by_part = listing.folder, {part: list[Path]() for part in parts}
    lost: list[Path] = []
    for path in listing.images:
        inside = by_part.get(folder / path.relative_to(folder).parts[0])
        (lost if inside is None else inside).append(path)
    if lost:
        raise PatchError(
            f"expected all images of {folder} in folders named repeats_name, as "
            f"{next(iter(parts)).name} is, found {len(lost)} elsewhere, such as {lost[0]}: move "
            "them, or rename their folder, for example to 1_name; a folder whose name begins with "
            "a dot is left out."
        )
    for part, repeats in parts.items():
        if not repeats.count:
            names = [sample_key(path, folder) for path in by_part[part]]
            found.skips.add(f"images of folder {part.name}, which has 0 repeats", names)
            continue
        values = values_of(options)
        values["class_tokens"] = values["class_tokens"] or repeats.name
        subset = make_subset(values, kind, part.name, repeats.count, masked=masks is not None)
        add_samples(
            found,
            Part(listing, by_part[part], folder, part, subset, source_of(options), masks),
            kind,
        )


def _add_classes(found: Found, listing: Listing, options: DataOptions, kind: DataKind) -> None:
    """ImageNet's layout: the folder directly below is the class."""
    folder = listing.folder
    loose = [path for path in listing.images if path.parent == folder]
    if loose:
        raise PatchError(
            f"expected one folder for each class in {folder}, found {len(loose)} images outside of "
            f"them, such as {loose[0].name}: move them into the folder of their class."
        )
    names = sorted({path.relative_to(folder).parts[0] for path in listing.images})
    ids, found.classes = class_ids(names, options.class_list, kind, f"folders of {folder}")
    masks = Masks.of(options.conditioning_data_dir, folder, found)
    subset = make_subset(values_of(options), kind, folder.name, masked=masks is not None)
    for sample in measured(found, listing.images, folder, subset, masks):
        label = ids[Path(sample.place).relative_to(folder).parts[0]]
        found.samples.append(_labelled(sample, label))


def _labelled(sample: Sample, label: int) -> Sample:
    return replace(sample, label=label)
