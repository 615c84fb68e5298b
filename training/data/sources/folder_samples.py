"""From the files of a folder to samples: sizes, captions, masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmp_common import PatchError
from training.data.captions.caption_files import (
    ENDINGS,
    About,
    CaptionSource,
    caption_file,
    dotted,
)
from training.data.captions.metadata_files import METADATA, Described, folder_metadata, kohya_json
from training.data.kind import DataKind
from training.data.samples import FileStore, Sample, Subset
from training.data.sources.found import Found
from training.data.sources.listing import Listing
from training.data.sources.masks import Masks
from training.data.sources.scan import in_threads, sizes_of


@dataclass(frozen=True)
class Part:
    """A part of a listing: images with common rules.

    Args:
        listing: of the folder that was searched.
        images: of this part.
        root: keys are paths relative to it.
        folder: of the part; metadata files are looked for here and below.
        subset: its rules.
        source: of its captions.
        masks: its mask images.
    """

    listing: Listing
    images: Sequence[Path]
    root: Path
    folder: Path
    subset: Subset
    source: CaptionSource
    masks: Masks | None = None


def add_samples(found: Found, part: Part, kind: DataKind) -> None:
    """Adds the images of a part with what goes with them.

    Raises:
        PatchError: metadata or captions that are not understood.
    """
    images, about = list(part.images), dict[Path, About]()
    if kind.conditioning == "caption":
        images, about = _described(found, part)
    for sample in measured(found, images, part.root, part.subset, part.masks):
        known = about.get(Path(sample.place), About())
        bucket = _checked_bucket(known, part.subset, kind, sample.place)
        if known.file is not None and not known.captions:
            found.empty.add(sample.key)
        found.samples.append(replace(sample, captions=known.captions, bucket=bucket))


def measured(
    found: Found, images: Sequence[Path], root: Path, subset: Subset, masks: Masks | None
) -> list[Sample]:
    """Images with their sizes and masks; those that cannot be used are counted."""
    samples = []
    store, places = FileStore(), [str(path) for path in images]
    for path, place, size in zip(images, places, sizes_of(store, places), strict=True):
        key = sample_key(path, root)
        if isinstance(size, PatchError):
            found.skips.add_broken(key, size)
            continue
        mask = None if masks is None else masks.of_image(path)
        if masks is None or mask is not None:
            samples.append(Sample(key, place, size, subset, mask=mask))
    return samples


def sample_key(path: Path, root: Path) -> str:
    """The path from `root`, or the whole path of an image that lies elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _described(found: Found, part: Part) -> tuple[list[Path], dict[Path, About]]:
    """Images with their captions. Metadata say which images count in their folder and below."""
    source = part.source
    if source.metadata is not None:
        described = kohya_json(source.metadata, part.images, part.folder, source.encoding)
        _say_described(found, part.folder, source.metadata, described)
        return _chosen(found, part.images, part.folder, source.metadata.name, described)
    images: list[Path] = []
    about: dict[Path, About] = {}
    rest = list(part.images)
    for folder in _metadata_folders(part):
        inside = [path for path in rest if path.is_relative_to(folder)]
        described = folder_metadata(folder, inside, source.column, source.encoding) or Described()
        chosen = set(inside)
        rest = [path for path in rest if path not in chosen]
        _say_described(found, folder, folder / "metadata", described)
        more, known = _chosen(found, inside, folder, "its metadata", described)
        images, about = images + more, {**about, **known}
    more, known = _from_files(found, part, rest)
    return sorted(images + more, key=Path.as_posix), {**about, **known}


def _metadata_folders(part: Part) -> list[Path]:
    """Folders with a metadata file, those further down first."""
    folders = [
        folder
        for folder, names in part.listing.names.items()
        if folder.is_relative_to(part.folder) and any(name in names for name in METADATA)
    ]
    return sorted(folders, key=lambda folder: (-len(folder.parts), folder.as_posix()))


def _say_described(found: Found, folder: Path, file: Path, described: Described) -> None:
    reason = f"entries of {file.name} that name no image in {folder}"
    found.skips.add(reason, described.gone)
    if described.moved:
        found.notes.append(
            f"{described.moved} entries of {file.name} have another path than the images, and were "
            "found by the end of it"
        )


def _chosen(
    found: Found, images: Sequence[Path], folder: Path, name: str, described: Described
) -> tuple[list[Path], dict[Path, About]]:
    left = [sample_key(path, folder) for path in images if path not in described.about]
    found.skips.add(f"images of {folder.name} that are not in {name}", left)
    return [path for path in images if path in described.about], described.about


def _from_files(
    found: Found, part: Part, images: Sequence[Path]
) -> tuple[list[Path], dict[Path, About]]:
    def read(path: Path) -> About | PatchError:
        try:
            return caption_file(path, part.source, part.listing.find)
        except PatchError as error:
            return error

    about: dict[Path, About] = {}
    unreadable = []
    for path, known in zip(images, in_threads(read, images), strict=True):
        if isinstance(known, PatchError):
            unreadable.append((path, known))
        else:
            about[path] = known
    if found.skips.any_number:
        names = [sample_key(path, part.root) for path, _ in unreadable]
        found.skips.add("images whose caption cannot be read", names)
    else:
        found.problems += [error for _, error in unreadable]
    _say_lines(found, part.subset, about)
    _say_shared(found, about)
    _say_unused(found, part, about)
    if not part.subset.captions.enable_wildcard:
        about = {
            path: replace(known, captions=known.captions[:1]) if known.lines else known
            for path, known in about.items()
        }
    return list(about), about


def _say_lines(found: Found, subset: Subset, about: dict[Path, About]) -> None:
    longer = [known for known in about.values() if known.lines and len(known.captions) > 1]
    if longer and not subset.captions.enable_wildcard:
        assert longer[0].file is not None, "its lines are from a file"
        found.notes.append(
            f"{subset.name}: {len(longer)} caption files have several lines, of which the first is "
            f"used (such as {longer[0].file.name}); --enable_wildcard draws one"
        )


def _say_shared(found: Found, about: dict[Path, About]) -> None:
    """Notes images that share a caption file, such as a.jpg and a.png."""
    counts = Counter(known.file for known in about.values() if known.file is not None)
    shared = [file for file, count in counts.items() if count > 1]
    if shared:
        found.notes.append(
            f"{len(shared)} caption files belong to several images, such as {shared[0].name}"
        )


def _say_unused(found: Found, part: Part, about: dict[Path, About]) -> None:
    """Notes caption files that no image has, or of which an image has another one."""
    used = {known.file for known in about.values()}
    extension = part.source.extension
    endings = ENDINGS if extension is None else (dotted(extension),)
    unused = [
        folder / name
        for folder, names in part.listing.names.items()
        if folder.is_relative_to(part.folder)
        for name in names
        if name.lower().endswith(endings) and folder / name not in used
    ]
    if unused and about:
        some = ", ".join(sample_key(path, part.root) for path in sorted(unused)[:3])
        found.notes.append(f"{len(unused)} caption files are not used ({some})")


def _checked_bucket(
    about: About, subset: Subset, kind: DataKind, place: str
) -> tuple[int, int] | None:
    if about.bucket is None or not subset.sizes.bucket:
        return None
    if any(side < 1 or side % kind.multiple for side in about.bucket):
        raise PatchError(
            f"expected train_resolution in multiples of {kind.multiple} for {place}, which this "
            f"base needs, found {list(about.bucket)}: change the metadata."
        )
    return about.bucket
