"""Folders of images: with captions, with repeats in their names, by class, or just images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmp_common import PatchError
from dmp_common.errors import printable
from training.data.captions.caption_files import (
    About,
    CaptionSource,
    caption_file,
    folder_metadata,
    kohya_json,
    read_text,
)
from training.data.indexed import Found
from training.data.kind import DataKind
from training.data.rules import make_subset, values_of
from training.data.samples import FileStore, Sample, Subset
from training.data.sources.scan import list_images, sizes_of

CACHE = ".dmp_cache"  # hidden, so that it is never searched for images
_MOST_CLASSES = 1_000_000  # each id below the highest gets a name
_REPEATS = re.compile(r"(\d+)_(.*)")


def find_folder(options: Any, kind: DataKind) -> Found:
    """The images of `--train_data_dir`.

    Raises:
        PatchError: no images, broken ones, or what goes with them is missing.
    """
    folder = Path(options.train_data_dir)
    images = list_images(folder)
    if not images:
        raise PatchError(
            f"expected images in {folder}, found none: check --train_data_dir; endings such as "
            ".jpg, .png and .webp are looked for, in all folders below it."
        )
    values = values_of(options)
    if kind.conditioning == "label":
        return _class_folders(folder, images, options, kind)
    # Without captions, `0_airplane` is a name like any other.
    parts = _repeat_folders(folder) if kind.conditioning == "caption" else {}
    if not parts:
        subset = make_subset(values, kind, folder.name)
        samples, notes = folder_samples(images, folder, folder, subset, kind, _source(options))
        return Found(str(folder), samples, FileStore(), folder / CACHE, notes)
    return _repeated(folder, images, parts, options, kind)


def _source(options: Any) -> CaptionSource:
    metadata = Path(options.in_json) if options.in_json else None
    return CaptionSource(options.caption_extension, options.caption_column, metadata)


def _repeat_folders(folder: Path) -> dict[Path, tuple[int, str]]:
    """Kohya's folders: `10_name` is seen ten times an epoch, its default caption is `name`."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = _REPEATS.fullmatch(path.name)
        if path.is_dir() and match:
            found[path] = int(match[1]), match[2].strip()
    return found


def _repeated(
    folder: Path,
    images: list[Path],
    parts: Mapping[Path, tuple[int, str]],
    options: Any,
    kind: DataKind,
) -> Found:
    samples: list[Sample] = []
    notes: list[str] = []
    by_part: dict[Path | None, list[Path]] = {part: [] for part in parts}
    for path in images:
        part = folder / path.relative_to(folder).parts[0]
        by_part.setdefault(part if part in parts else None, []).append(path)
    lost = by_part.pop(None, [])
    if lost:
        raise PatchError(
            f"expected all images of {folder} in folders named repeats_name, as "
            f"{next(iter(parts)).name} is, found {len(lost)} elsewhere, such as {lost[0]}: move "
            "them, or rename their folder, for example to 1_name; a folder whose name begins with "
            "a dot is left out."
        )
    for part, (repeats, name) in parts.items():
        inside = by_part[part]
        if not repeats:
            notes.append(f"folder {part.name}: 0 repeats, its {len(inside)} images are not used")
            continue
        values = values_of(options)
        values["class_tokens"] = values["class_tokens"] or name or None
        subset = make_subset(values, kind, part.name, repeats)
        more, said = folder_samples(inside, folder, part, subset, kind, _source(options))
        samples, notes = samples + more, notes + said
    if not samples:
        raise PatchError(f"expected images in the folders of {folder}, found none to use.")
    return Found(str(folder), samples, FileStore(), folder / CACHE, notes)


def folder_samples(
    images: Sequence[Path],
    root: Path,
    folder: Path,
    subset: Subset,
    kind: DataKind,
    source: CaptionSource,
) -> tuple[list[Sample], list[str]]:
    """Samples of a folder with what goes with them, and notes.

    Args:
        root: keys are paths relative to it.
        folder: where metadata files are looked for.
        source: of captions.

    Raises:
        PatchError: a broken image, or captions that are missing or not understood.
    """
    notes: list[str] = []
    about: Mapping[Path, About] = {}
    images = list(images)
    if kind.conditioning == "caption":
        images, about = _described(images, folder, subset, source, notes)
    store = FileStore()
    samples = []
    for path, size in zip(images, sizes_of(store, [str(path) for path in images]), strict=True):
        known = about.get(path, About(()))
        bucket = _checked_bucket(known, subset, kind, path)
        key = sample_key(path, root)
        samples.append(Sample(key, str(path), size, subset, known.captions, bucket=bucket))
    return samples, notes


def sample_key(path: Path, root: Path) -> str:
    """The path from `root`, or the whole path of an image that lies elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def require_captions(samples: Sequence[Sample], kind: DataKind, options: Any) -> list[str]:
    """Notes on images without captions, where the user allows them.

    Raises:
        PatchError: captions are missing and nobody said that this is meant.
    """
    if kind.conditioning != "caption":
        return []
    bare = [s for s in samples if not any(s.captions) and not s.subset.captions.class_tokens]
    if not bare:
        return []
    some = ", ".join(sample.key for sample in bare[:3]) + (", ..." if len(bare) > 3 else "")
    if not options.allow_empty_captions:
        raise PatchError(
            f"expected a caption for every image, found {len(bare)} of {len(samples)} without one "
            f"({some}): put a text file of the same name beside each (photo.jpg, photo.txt), give "
            "--class_tokens for all that have none, or --allow_empty_captions to train them on "
            "the empty caption."
        )
    return [f"{len(bare)} images are trained on the empty caption ({some})"]


def _described(
    images: list[Path],
    folder: Path,
    subset: Subset,
    source: CaptionSource,
    notes: list[str],
) -> tuple[list[Path], Mapping[Path, About]]:
    """Images with their captions; metadata, where there is some, says which images count."""
    if source.metadata is not None:
        about: Mapping[Path, About] = kohya_json(source.metadata, images, folder)
    else:
        about = folder_metadata(folder, source.column) or {}
    if about:
        chosen = [path for path in images if path in about]
        if len(chosen) < len(images):
            notes.append(
                f"{subset.name}: {len(images) - len(chosen)} of {len(images)} images are not in "
                "its metadata and not used"
            )
        return chosen, about
    lines = {path: caption_file(path, source.extension) or () for path in images}
    if subset.captions.enable_wildcard:
        return images, {path: About(found) for path, found in lines.items()}
    longer = [path for path, found in lines.items() if len(found) > 1]
    if longer:
        notes.append(
            f"{subset.name}: {len(longer)} caption files have several lines, of which the first is "
            f"used (such as that of {longer[0].name}); --enable_wildcard draws one"
        )
    return images, {path: About(found[:1]) for path, found in lines.items()}


def _checked_bucket(
    about: About, subset: Subset, kind: DataKind, path: Path
) -> tuple[int, int] | None:
    if about.bucket is None or not subset.sizes.bucket:
        return None
    if any(side < 1 or side % kind.multiple for side in about.bucket):
        raise PatchError(
            f"expected train_resolution in multiples of {kind.multiple} for {path}, which this "
            f"base needs, found {list(about.bucket)}: change the metadata."
        )
    return about.bucket


def _class_folders(folder: Path, images: list[Path], options: Any, kind: DataKind) -> Found:
    """ImageNet's layout: the folder directly below is the class."""
    loose = [path for path in images if path.parent == folder]
    if loose:
        raise PatchError(
            f"expected one folder for each class in {folder}, found {len(loose)} images outside of "
            f"them, such as {loose[0].name}: move them into the folder of their class."
        )
    names = sorted({path.relative_to(folder).parts[0] for path in images})
    ids, classes = class_ids(names, options.class_list, kind, f"folders of {folder}")
    subset = make_subset(values_of(options), kind, folder.name)
    store, places = FileStore(), [str(path) for path in images]
    samples = []
    for path, place, size in zip(images, places, sizes_of(store, places), strict=True):
        label = ids[path.relative_to(folder).parts[0]]
        samples.append(Sample(sample_key(path, folder), place, size, subset, label=label))
    return Found(str(folder), samples, store, folder / CACHE, classes=classes)


def class_ids(
    names: Sequence[str], class_list: str | None, kind: DataKind, where: str
) -> tuple[dict[str, int], list[str]]:
    """Ids of class names, and the names of all ids.

    The names are ids by themselves if they all are numbers; else a class list gives the ids, else
    the alphabet, as for ImageNet, if there are as many names as the base has classes.

    Raises:
        PatchError: names that are in no list, or more or fewer than the base has classes.
    """
    count = kind.num_classes
    if class_list is not None:
        path = Path(class_list)
        if not path.is_file():
            raise PatchError(f"expected a list of classes at {path}, found no such file.")
        known = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise PatchError(
                f"expected classes of {path}, found {len(unknown)} others in {where}, such as "
                f"{unknown[0]}: add them to the list, or rename them."
            )
        ids = {name: known.index(name) for name in names}
    elif all(name.isdecimal() for name in names):
        ids = {name: int(name) for name in names}
        if max(ids.values(), default=0) >= _MOST_CLASSES:
            raise PatchError(
                f"expected class ids below {_MOST_CLASSES:,} as names in {where}, found "
                f"{printable(max(names, key=len))}: rename the classes, or give --class_list."
            )
        known = [str(n) for n in range(max(ids.values(), default=-1) + 1)]
    elif count is not None and len(names) < count:
        raise PatchError(
            f"expected {count} classes, as the base has, found {len(names)} in {where}: which "
            "class is which? Give --class_list, a file with one name a line in the order of the "
            "base's ids, or name the classes by their ids."
        )
    else:
        ids, known = {name: n for n, name in enumerate(sorted(names))}, sorted(names)
    if count is not None and max(ids.values(), default=0) >= count:
        raise PatchError(
            f"expected at most {count} classes, as the base has, found id {max(ids.values())} in "
            f"{where}: check the data and --class_list."
        )
    return ids, known
