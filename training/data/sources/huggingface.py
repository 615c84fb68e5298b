"""Data sets of the Hugging Face `datasets` library: from the hub, or from the disk."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dmp_common import PatchError
from dmp_common.patch.serialize import open_regular
from training.data.captions.texts import COLUMNS, captions_of
from training.data.kind import DataKind
from training.data.rules import make_subset, values_of
from training.data.samples import Sample
from training.data.skips import Skips
from training.data.sources.classes import class_ids
from training.data.sources.found import Found
from training.data.sources.listing import CACHE
from training.data.sources.scan import sizes_of
from training.options.data_options import DataOptions

_FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_RELEASE = 4  # earlier ones run the script of a data set, if the environment or the user allows it


class EmptyRowError(PatchError):
    """A row without an image."""


class RowStore:
    """Encoded images of a data set: a place is a row. Memory-mapped, so that workers share it."""

    def __init__(self, dataset: Any, column: str, name: str) -> None:
        self._images, self._column, self._name = dataset.select_columns([column]), column, name

    def open(self, place: int) -> BinaryIO:
        """The image's bytes, or its file."""
        found = self._images[place][self._column]
        if found is None or (found["bytes"] is None and not found["path"]):
            raise EmptyRowError(
                f"expected an image in {self.name(place)}, found none: remove the row."
            )
        if found["bytes"] is not None:
            return io.BytesIO(found["bytes"])
        return open_regular(Path(found["path"]), "an image")

    def name(self, place: int) -> str:
        """How an error names it."""
        return f"{self._name}, row {place}"

    def fingerprint(self, place: int) -> str:
        """Hash of the whole image: its bytes are in one file with all others."""
        with self.open(place) as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()

    def stamp(self, place: int) -> str:
        """The same: reading an image takes much less time than decoding it."""
        return self.fingerprint(place)


def find_huggingface(options: DataOptions, kind: DataKind) -> Found:
    """The images of `--dataset_name`.

    Raises:
        PatchError: the library or the data set is missing, or its columns do not fit the base.
    """
    name = str(options.dataset_name)
    dataset = _load(name, options)
    features = dataset.features
    image = _column(options.image_column, "image_column", features, _image_columns(features), name)
    from datasets import Image

    dataset = dataset.cast_column(image, Image(decode=False))
    subset = make_subset(values_of(options), kind, name)
    store = RowStore(dataset, image, name)
    folder = Path(name) / CACHE if Path(name).is_dir() else None
    found = Found(f"{name} ({options.dataset_split})", store, Skips(options), folder=folder)
    captions: Sequence[tuple[str, ...]] = [()] * len(dataset)
    labels: Sequence[int | None] = [None] * len(dataset)
    if kind.conditioning == "caption":
        captions = _captions(dataset, options, name)
    elif kind.conditioning == "label":
        column = _column(
            options.label_column, "label_column", features, _label_columns(features), name
        )
        labels, found.classes = _labels(dataset[column], features[column], options, kind, name)
    for row, size in enumerate(sizes_of(store, range(len(dataset)))):
        key = f"{options.dataset_split}/{row:08d}"
        if isinstance(size, EmptyRowError):
            found.skips.add("rows without an image", [key])
        elif isinstance(size, PatchError):
            found.skips.add_broken(key, size)
        elif kind.conditioning == "label" and labels[row] is None:
            _add_unlabelled(found, key)
        else:
            found.samples.append(Sample(key, row, size, subset, captions[row], labels[row]))
    return found


def _add_unlabelled(found: Found, key: str) -> None:
    if found.skips.any_number:
        found.skips.add("rows without a class", [key])
    else:
        found.problems.append(
            PatchError(
                f"expected a class id in {found.source}, {key}, found none: remove the row, or "
                "give --skip_broken."
            )
        )


def _captions(dataset: Any, options: DataOptions, name: str) -> list[tuple[str, ...]]:
    features = dataset.features
    column = _column(
        options.caption_column, "caption_column", features,
        [entry for entry in COLUMNS if entry in features], name,
    )  # fmt: skip
    return [captions_of(value, f"{name}, row {n}") for n, value in enumerate(dataset[column])]


def _load(name: str, options: DataOptions) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PatchError(
            "expected the datasets library for --dataset_name, found it is not installed: run pip "
            "install datasets."
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _RELEASE:
        raise PatchError(
            f"expected the datasets library {_RELEASE}.0 or later for --dataset_name, found "
            f"{datasets.__version__}, which can run code that comes with a data set: run pip "
            "install --upgrade datasets."
        )
    path, split = Path(name), options.dataset_split
    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            found = datasets.load_from_disk(name)
            if not isinstance(found, datasets.DatasetDict):
                return found
            if split not in found:
                raise PatchError(
                    f"expected split {split} in {name}, found {', '.join(found)}: give "
                    "--dataset_split."
                )
            return found[split]
        if path.is_file() and path.suffix in _FILES:
            kind = _FILES[path.suffix]
            return datasets.load_dataset(kind, data_files={split: str(path)}, split=split)
        return datasets.load_dataset(name, options.dataset_config_name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, PatchError):
            raise
        found_error = " ".join(str(error).split())
        raise PatchError(
            f"expected the data set {name}, split {split}, found: {found_error}: check "
            "--dataset_name, --dataset_config_name and --dataset_split."
        ) from error


def _column(
    asked: str | None, option: str, features: Any, candidates: Sequence[str], name: str
) -> str:
    if asked is not None and asked not in features:
        raise PatchError(
            f"expected column {asked} in {name}, found {', '.join(features)}: change --{option}."
        )
    if asked is None and not candidates:
        raise PatchError(
            f"expected a column for --{option} in {name}, found {', '.join(features)}: name it."
        )
    return asked or candidates[0]


def _image_columns(features: Any) -> list[str]:
    """Columns of images: by their type, or as structs of bytes and path, or as plain bytes."""
    from datasets import Image, Value

    def is_struct(feature: Any) -> bool:
        return isinstance(feature, dict) and "bytes" in feature

    def is_binary(feature: Any) -> bool:
        return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")

    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    found = found or [name for name, feature in features.items() if is_struct(feature)]
    return found or [name for name, feature in features.items() if is_binary(feature)]


def _label_columns(features: Any) -> list[str]:
    from datasets import ClassLabel

    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return found or [name for name in ("label", "class") if name in features]


def _labels(
    values: Any, feature: Any, options: DataOptions, kind: DataKind, name: str
) -> tuple[list[int | None], list[str]]:
    """Ids, None for rows without, and their names.

    The data set's own ids count, unless a class list says otherwise.
    """
    values = list(values)
    names = getattr(feature, "names", None)
    if names and options.class_list is None:
        if kind.num_classes is not None and len(names) > kind.num_classes:
            raise PatchError(
                f"expected at most {kind.num_classes} classes, as the base has, found "
                f"{len(names)} in {name}: choose other data."
            )
        known = [v if v is not None and 0 <= v < len(names) else None for v in values]
        return known, list(names)
    texts = [None if v is None else str(names[v]) if names else str(v) for v in values]
    ids, classes = class_ids(sorted({t for t in texts if t is not None}), options.class_list,
                             kind, name)  # fmt: skip
    return [None if text is None else ids[text] for text in texts], classes
