"""Kohya's dataset file: [general], [[datasets]], [[datasets.subsets]] under kohya's keys.

A value comes from the subset, else from its data set, else from [general], else from the command
line. Paths are relative to the working folder, as with kohya, or else to the file.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dmp_common import PatchError
from dmp_common.errors import printable
from dmp_common.patch.serialize import opened
from training.data.captions.caption_files import CaptionSource
from training.data.indexed import Found
from training.data.kind import DataKind
from training.data.rules import CAPTION_RULES, SIZE_RULES, make_subset, values_of
from training.data.samples import FileStore, Sample
from training.data.sources.folders import CACHE, folder_samples
from training.data.sources.scan import list_images
from training.options.data_options import DataOptions
from training.options.toml_files import parse_toml

_AUGMENTATIONS = {"flip_aug", "random_crop", "color_aug"}
_OF_SUBSETS = {*CAPTION_RULES, *_AUGMENTATIONS, "caption_extension", "num_repeats"}
_OF_DATASETS = {*_OF_SUBSETS, *SIZE_RULES, "batch_size"}
_PATHS = {"image_dir", "metadata_file"}
# Kohya's keys that ask for what there is not, and why; they may stand there switched off.
_REFUSED = {
    "is_reg": "a patch learns the base's own data, there is nothing to regularise against",
    "conditioning_data_dir": "ControlNets are not trained here",
    "alpha_mask": "losses are not masked; transparent parts become white",
    "face_crop_aug_range": "faces are not looked for",
    "token_warmup_step": "captions are whole from the first step on",
    "custom_attributes": "nothing would read them",
}
_WITHOUT_EFFECT = {"cache_info", "skip_image_resolution", "network_multiplier",
                   "prior_loss_weight", "token_warmup_min"}  # fmt: skip
_TYPES: dict[str, Any] = {"num_repeats": int, "batch_size": int, "image_dir": str,
                          "metadata_file": str}  # fmt: skip


@dataclass(frozen=True)
class SubsetTable:
    """One [[datasets.subsets]] with what it inherits."""

    where: str
    values: Mapping[str, Any]


def find_dataset_config(options: Any, kind: DataKind) -> Found:
    """The images of `--dataset_config`.

    Raises:
        PatchError: a key or value that is not understood, no images, or missing captions.
    """
    file = Path(options.dataset_config)
    if kind.conditioning == "label":
        raise PatchError(
            "expected a base that takes captions or nothing for --dataset_config, found one that "
            "takes class ids: give --train_data_dir with one folder for each class."
        )
    tables = list(subset_tables(file))
    _check_batch_size(tables, options.train_batch_size)
    samples: list[Sample] = []
    notes: list[str] = []
    for table in tables:
        more, said = _samples(table, file, options, kind)
        samples, notes = samples + more, notes + said
    if not samples:
        raise PatchError(f"expected images in the subsets of {file}, found none to use.")
    return Found(str(file), _distinct(samples), FileStore(), file.parent / CACHE, notes)


def subset_tables(file: Path) -> Iterator[SubsetTable]:
    """The subsets of a dataset file, each with the values it inherits.

    Raises:
        PatchError: not TOML, an unknown key, or a value of the wrong kind.
    """
    content = _parse(file)
    _check_names(content, {"general", "datasets"}, str(file))
    general = _checked(content.get("general", {}), _OF_DATASETS, f"[general] of {file}")
    for n, dataset in enumerate(_tables(content, "datasets", str(file)), 1):
        where = f"[[datasets]] {n} of {file}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        inherited = {**general, **_checked(own, _OF_DATASETS, where)}
        for m, subset in enumerate(_tables(dataset, "subsets", where), 1):
            name = f"[[datasets.subsets]] {m} of {where}"
            yield SubsetTable(name, {**inherited, **_checked(subset, _OF_SUBSETS | _PATHS, name)})


def _samples(
    table: SubsetTable, file: Path, options: Any, kind: DataKind
) -> tuple[list[Sample], list[str]]:
    values, where = table.values, table.where
    metadata = _path(values.get("metadata_file"), file)
    folder = _path(values.get("image_dir"), file) or (metadata and metadata.parent)
    if folder is None:
        raise PatchError(f"expected image_dir in {where}, found none: add it.")
    images = list_images(folder, recursive=False)
    if not images:
        raise PatchError(
            f"expected images in {folder}, the image_dir of {where}, found none: folders below it "
            "are subsets of their own."
        )
    repeats = int(values.get("num_repeats", 1))
    if repeats < 1:
        return [], [f"{folder.name}: {repeats} repeats, its {len(images)} images are not used"]
    rules = {**values_of(options), **{k: v for k, v in values.items() if k in SIZE_RULES
                                      or k in CAPTION_RULES}}  # fmt: skip
    extension = values.get("caption_extension", options.caption_extension)
    source = CaptionSource(extension, options.caption_column, metadata)
    subset = make_subset(rules, kind, folder.name, repeats)
    return folder_samples(images, file.parent, folder, subset, kind, source)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """An image in several subsets, at two resolutions say, gets a key in each."""
    seen: Counter[str] = Counter()
    distinct = []
    for sample in samples:
        seen[sample.key] += 1
        count = seen[sample.key]
        # The validation split hangs on the image: it must not be in both.
        distinct.append(
            sample if count == 1
            else replace(sample, key=f"{sample.key}@{count}", origin=sample.key)
        )  # fmt: skip
    return distinct


def _check_batch_size(tables: Sequence[SubsetTable], given: int) -> None:
    for table in tables:
        asked = table.values.get("batch_size", given)
        if asked != given:
            raise PatchError(
                f"expected the batch size of the command line, {given}, in {table.where}, found "
                f"batch_size {asked}: give --train_batch_size {asked}, or remove the key; data "
                "sets share their batches."
            )


def _parse(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PatchError(f"expected a dataset file at {file}, found none: check --dataset_config.")
    with opened(file, "a dataset file") as (content, _):
        return parse_toml(content.read(), file)


def _tables(content: Mapping[str, Any], name: str, where: str) -> list[Mapping[str, Any]]:
    found = content.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        raise PatchError(f"expected at least one [[...{name}]] in {where}, found none: add it.")
    return found


def _checked(table: Any, known: set[str], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise PatchError(f"expected a table {where}, found {printable(repr(table))}.")
    _check_names(table, known | set(_REFUSED) | _WITHOUT_EFFECT, where)
    for name, why in _REFUSED.items():
        if table.get(name):
            raise PatchError(
                f"expected no {name} in {where}, found {printable(repr(table[name]))}: {why}."
            )
    return {name: _value(name, value, where) for name, value in table.items() if name in known}


def _value(name: str, value: Any, where: str) -> Any:
    if name == "resolution":
        return value  # a number, a text or a pair; make_subset looks at it
    info = DataOptions.model_fields.get(name)
    kind: Any = _TYPES[name] if info is None else info.rebuild_annotation()
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise PatchError(
            f"{name} in {where}: {message}, found {printable(repr(value))}."
        ) from error


def _check_names(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in table:
        if name in known:
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
        if name in _OF_DATASETS:
            hint = "it belongs to [[datasets]] or [general]."
        raise PatchError(f"unknown key {name} in {where}: {hint}")


def _path(value: Any, file: Path) -> Path | None:
    if value is None:
        return None
    path = Path(value).expanduser()
    return path if path.is_absolute() or path.exists() else file.parent / path
