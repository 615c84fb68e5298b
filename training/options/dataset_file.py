"""Kohya's dataset file: [general], [[datasets]], [[datasets.subsets]] under kohya's keys.

A value comes from the subset, else from its data set, else from [general], else from the command
line. Imports no torch before a file is read: the command line checks dataset files early.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dmp_common.errors import PatchError, printable
from training.options.data_options import DataOptions
from training.options.kohya import is_off
from training.options.problems import ConfigError

CAPTION_KEYS = frozenset(
    name
    for name, info in DataOptions.model_fields.items()
    if info.json_schema_extra["section"] == "captions"  # type: ignore[index]
    and name not in ("allow_empty_captions", "caption_encoding", "caption_extension")
)
SIZE_KEYS = frozenset(
    {"resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
     "bucket_no_upscale"}
)  # fmt: skip
_AUGMENTATIONS = {"flip_aug", "random_crop", "color_aug", "alpha_mask"}
_OF_SUBSETS = {*CAPTION_KEYS, *_AUGMENTATIONS, "caption_extension", "num_repeats", "is_reg"}
_OF_DATASETS = {*_OF_SUBSETS, *SIZE_KEYS, "batch_size", "validation_split", "validation_seed"}
_PATHS = {"image_dir", "metadata_file", "conditioning_data_dir"}
# Kohya's keys that would change the result, and why they cannot; they may be switched off.
_REFUSED = {
    "face_crop_aug_range": "crops do not look for faces",
    "token_warmup_step": "captions are whole from the first step on; remove the key",
}
# Kohya's keys that change nothing for a patch.
_WITHOUT_EFFECT = {
    "cache_info": "image headers are read at every start, which takes seconds",
    "skip_image_resolution": "every image is used; --min_bucket_reso and --max_bucket_reso set "
    "the sizes",
    "network_multiplier": "a patch is trained at strength 1",
    "prior_loss_weight": "a patch is trained without regularisation images",
    "token_warmup_min": "captions are whole from the first step on",
    "custom_attributes": "nothing reads them",
    "resize_interpolation": "images are resized by Lanczos' filter with antialiasing",
}
# Other names that people give to keys.
_SYNONYMS = {
    "repeats": "num_repeats", "repeat": "num_repeats", "train_batch_size": "batch_size",
    "image_directory": "image_dir", "train_data_dir": "image_dir", "path": "image_dir",
    "in_json": "metadata_file", "caption_ext": "caption_extension", "reso": "resolution",
    "class_token": "class_tokens", "instance_prompt": "class_tokens", "flip": "flip_aug",
    "mask_dir": "conditioning_data_dir", "shuffle": "shuffle_caption", "dataset": "datasets",
    "subset": "subsets", "bucket": "enable_bucket", "seed": "validation_seed",
}  # fmt: skip
_ALIKE = 0.8  # how like a known key an unknown one must be to be taken for a slip of the pen
_TYPES: dict[str, Any] = {"num_repeats": int, "image_dir": str, "metadata_file": str,
                          "is_reg": bool}  # fmt: skip


@dataclass(frozen=True)
class SubsetTable:
    """One [[datasets.subsets]] with what it inherits, under kohya's keys."""

    where: str
    values: Mapping[str, Any]


@dataclass
class DatasetFile:
    """A dataset file that was read.

    Args:
        path: of the file.
        subsets: in the order of the file, without those that are not trained.
        notes: what the user should know, a sentence each.
    """

    path: Path
    subsets: list[SubsetTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def batch_sizes(self) -> set[int | None]:
        """Batch sizes of its data sets; None for those that leave it to the command line."""
        return {table.values.get("batch_size") for table in self.subsets}

    @property
    def validates(self) -> bool:
        """Whether a data set keeps images for validation by itself."""
        return any(table.values.get("validation_split") for table in self.subsets)


def read_dataset_file(path: Path) -> DatasetFile:
    """Reads and checks a dataset file; images are not looked for.

    Raises:
        ConfigError: everything that is wrong with the file.
    """
    problems: list[str] = []
    found = DatasetFile(path)
    content = _content(path)
    _Reader(str(path), found, problems).read(content)
    if not problems and not found.subsets:
        problems.append(f"expected a [[datasets.subsets]] to train in {path}, found none to use.")
    if problems:
        raise ConfigError(*problems)
    return found


def batch_of_file(chosen: Mapping[str, Any]) -> dict[str, int]:
    """What a step is where a dataset file has batch sizes, which win as with kohya's scripts.

    One size for all is that of the run. With several, no recipe can say how many images make a
    step, so each batch is one, unless the user accumulates them.

    Args:
        chosen: the options that the user gave, by name.
    """
    if is_off(chosen.get("dataset_config")):
        return {}
    try:
        sizes = read_dataset_file(Path(str(chosen["dataset_config"]))).batch_sizes
    except ConfigError:
        return {}  # all that is wrong with the file is told by whoever looks at the data
    one = next(iter(sizes))
    if len(sizes) == 1:
        return {} if one is None else {"train_batch_size": one}
    given = ("gradient_accumulation_steps", "global_batch_size")
    return {} if any(map(chosen.get, given)) else {"gradient_accumulation_steps": 1}


def _content(path: Path) -> dict[str, Any]:
    # Here, because `--help` does without torch.
    from dmp_common.patch.serialize import opened
    from training.options.toml_files import parse_toml

    if not path.is_file():
        raise ConfigError(f"expected a dataset file at {path}, found none: check --dataset_config.")
    try:
        with opened(path, "a dataset file") as (file, _):
            return parse_toml(file.read(), path)
    except PatchError as error:
        raise ConfigError(str(error)) from error


@dataclass
class _Reader:
    """Reads the tables of a file, and collects what is wrong with them."""

    file: str
    found: DatasetFile
    problems: list[str]

    def read(self, content: Mapping[str, Any]) -> None:
        self._check_names(content, {"general", "datasets"}, self.file)
        general = self._checked(content.get("general", {}), _OF_DATASETS, "[general]")
        for n, dataset in enumerate(self._tables(content, "datasets", self.file), 1):
            where = f"[[datasets]] {n}"
            own = {key: value for key, value in dataset.items() if key != "subsets"}
            inherited = {**general, **self._checked(own, _OF_DATASETS, where)}
            subsets = self._tables(dataset, "subsets", f"{where} of {self.file}")
            for m, subset in enumerate(subsets, 1):
                name = f"[[datasets.subsets]] {m} of {where}"
                values = self._checked(subset, _OF_SUBSETS | _PATHS, name)
                self._add(SubsetTable(f"{name} of {self.file}", {**inherited, **values}))

    def _add(self, table: SubsetTable) -> None:
        values = table.values
        if values.get("is_reg"):
            self.found.notes.append(
                f"{table.where} has regularisation images (is_reg) and is left out: a patch learns "
                "the base's own data, there is nothing to regularise against"
            )
            return
        if not values.get("image_dir") and not values.get("metadata_file"):
            self.problems.append(f"expected image_dir in {table.where}, found none: add it.")
            return
        self.found.subsets.append(table)

    def _tables(
        self, content: Mapping[str, Any], name: str, where: str
    ) -> Iterator[Mapping[str, Any]]:
        tables = content.get(name)
        if not isinstance(tables, list) or not tables or any(
            not isinstance(table, dict) for table in tables
        ):  # fmt: skip
            self.problems.append(
                f"expected at least one [[...{name}]] in {where}, found none: add it."
            )
            return
        yield from tables

    def _checked(self, table: Any, known: set[str], place: str) -> dict[str, Any]:
        where = f"{place} of {self.file}"
        if not isinstance(table, dict):
            self.problems.append(f"expected a table {where}, found {_shown(table)}.")
            return {}
        self._check_names(table, known | set(_REFUSED) | set(_WITHOUT_EFFECT), where)
        for name, value in table.items():
            if name in _REFUSED and not is_off(value):
                self.problems.append(
                    f"expected no {name} in {where}, found {_shown(value)}: {_REFUSED[name]}."
                )
            elif name in _WITHOUT_EFFECT and not (is_off(value) or value == "lanczos"):
                self.found.notes.append(
                    f"{name} in {where} changes nothing here: {_WITHOUT_EFFECT[name]}"
                )
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name in known:
                values |= self._value(name, value, where)
        return values

    def _value(self, name: str, value: Any, where: str) -> dict[str, Any]:
        """The value under its name; nothing where it is none, which is a problem."""
        option = "train_batch_size" if name == "batch_size" else name
        info = DataOptions.model_fields.get(option)
        kind: Any = _TYPES[name] if info is None else info.rebuild_annotation()
        if name == "resolution":
            kind = int | str | tuple[int] | tuple[int, int]
        if value == "" and info is not None and info.default is None:
            return {}  # an option that is off, as configuration tools write it
        try:
            return {name: TypeAdapter(kind).validate_python(value)}
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            self.problems.append(f"{name} in {where}: {message}, found {_shown(value)}.")
            return {}

    def _check_names(self, table: Mapping[str, Any], known: set[str], where: str) -> None:
        for name in table:
            if name not in known:
                hint = _hint(name, known)
                self.problems.append(f"unknown key {printable(name)} in {where}: {hint}")


def _hint(name: str, known: set[str]) -> str:
    """What may have been meant; never a key that is refused or changes nothing."""
    useful = known - set(_REFUSED) - set(_WITHOUT_EFFECT)
    if name in _OF_DATASETS:
        return "it belongs to [[datasets]] or [general]."
    if name in _PATHS:
        return "it belongs to [[datasets.subsets]]."
    near = difflib.get_close_matches(name, sorted(useful), n=1, cutoff=_ALIKE)
    meant = _SYNONYMS.get(name) if _SYNONYMS.get(name) in useful else next(iter(near), None)
    if meant is not None:
        return f"did you mean {meant}?"
    return "docs/DATA.md lists the keys; remove it."


def _shown(value: object) -> str:
    return printable(repr(value))
