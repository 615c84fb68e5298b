"""From options to data: `open_data` is where the trainer begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from dmp_common import PatchError
from training.data.batch import Batch, Data, Position
from training.data.caching.encoding import Encoders
from training.data.caching.plan import plan_caches
from training.data.indexed import IndexedData
from training.data.items import Recipe
from training.data.kind import DataKind
from training.data.sources.dataset_config import find_dataset_config
from training.data.sources.digits import DIGITS, find_digits
from training.data.sources.folders import find_folder
from training.data.sources.found import Found
from training.data.sources.huggingface import find_huggingface
from training.data.splitting import split_samples
from training.data.stream.streaming import open_stream, open_stream_splits
from training.data.summary import DataSummary
from training.options.data_options import DataOptions, named_sources, several_sources

__all__ = [
    "Batch",
    "Data",
    "DataKind",
    "DataSummary",
    "Encoders",
    "Position",
    "open_data",
    "open_splits",
]

Split = Literal["train", "validation", "test"]
_BOTH: tuple[Split, Split] = ("train", "validation")


def open_data(options: DataOptions, kind: DataKind, *, seed: int, split: Split) -> Data:
    """One split of the data that options ask for. Every image's header is checked here.

    Nothing is encoded yet; `Data.prepare_caches` does that, once there are encoders.

    Args:
        options: of the data.
        kind: what the base needs.
        seed: of order, augmentation and dropout; the split does not depend on it.
        split: "train" without the validation images, or these alone: not shuffled, mirrored or
            dropped. "test" is all images, as for validation; of the digits, their test split.

    Raises:
        PatchError: no data, several sources of data, broken images, missing captions or classes,
            or options that contradict each other; nothing is written then.
    """
    source, notes = _checked_source(options, kind)
    if source == "webdataset":
        if split == "validation" and not options.validation_split:
            raise _no_validation()
        return open_stream(options, kind, seed, split)
    found = _find(source, options, kind, split)
    found.check(options, kind)
    found.notes += notes
    if not _is_digits(options) and split != "test":
        _split(found, split)
    return _indexed(found, options, kind, seed, split)


def open_splits(
    options: DataOptions, kind: DataKind, *, seed: int, share: Callable[[int], float]
) -> tuple[Data, Data | None]:
    """The training images and those that are held out; all are looked at once.

    Args:
        options, kind, seed: see `open_data`.
        share: what to hold out of so many images where no option says; 0 for nothing.

    Returns:
        Both splits; None where nothing is held out.

    Raises:
        PatchError: see `open_data`.
    """
    source, notes = _checked_source(options, kind)
    if source == "webdataset":
        return open_stream_splits(options, kind, seed)
    if _is_digits(options):
        found = {split: _find(source, options, kind, split) for split in _BOTH}
        train, held_out = (_indexed(found[s], options, kind, seed, s) for s in _BOTH)
        return train, None if options.validation_split == 0 else held_out
    whole = _find(source, options, kind, "train")
    whole.check(options, kind)
    whole.notes += notes
    if options.validation_split is None and not _holds_out(whole):
        images = len({sample.origin or sample.key for sample in whole.samples})
        held = share(images), options.validation_seed
        subsets = {s: replace(s, validation=held) for s in {s.subset for s in whole.samples}}
        whole.samples = [replace(s, subset=subsets[s.subset]) for s in whole.samples]
    parts = {split: replace(whole, notes=list(whole.notes)) for split in _BOTH}
    wanted: list[Split] = ["train", "validation"] if _holds_out(whole) else ["train"]
    for split in wanted:
        _split(parts[split], split)
    both = [_indexed(parts[split], options, kind, seed, split) for split in wanted]
    return both[0], both[1] if len(both) > 1 else None


def _indexed(
    found: Found, options: DataOptions, kind: DataKind, seed: int, split: Split
) -> IndexedData:
    masked = any(s.subset.alpha_mask or s.subset.masked for s in found.samples)
    recipe = Recipe(kind, found.store, seed, augment=split == "train", masked=masked)
    subsets = {sample.subset for sample in found.samples}
    return IndexedData(found, recipe, plan_caches(options, kind, subsets, found.folder))


def _checked_source(options: DataOptions, kind: DataKind) -> tuple[str, list[str]]:
    """The source of data with its notes, once the options fit it and the base."""
    source, notes = _source(options)
    _check_fitting(options, source, kind)
    if kind.conditioning == "label" and options.caption_dropout_rate and kind.null_label is None:
        raise PatchError(
            "expected --caption_dropout_rate 0 for a base without a label that means none, found "
            f"{options.caption_dropout_rate}: set it to 0."
        )
    return source, notes


def _source(options: DataOptions) -> tuple[str, list[str]]:
    """The source of data, and notes on what does not count beside it."""
    given = named_sources(options)
    if len(given) == 1:
        unused = [name for name in ("train_data_dir", "in_json") if getattr(options, name)]
        if given[0] != "dataset_config":
            return given[0], []
        return given[0], [
            f"--{name} is not used, because --dataset_config names images and captions by itself"
            for name in unused
        ]
    if given:
        raise PatchError(several_sources(given))
    raise PatchError(
        "expected data to train on, found none. Give one of:\n"
        "  --train_data_dir photos   (a folder of images, photo.txt beside photo.jpg)\n"
        "  --dataset_config dataset.toml   (kohya's file of subsets)\n"
        '  --webdataset "shards/{00000..00099}.tar"   (paths or URLs)\n'
        "  --dataset_name user/dataset   (Hugging Face)\n"
        "docs/DATA.md shows how each is laid out."
    )


def _check_fitting(options: DataOptions, source: str, kind: DataKind) -> None:
    """Refuses options that this source or base would pass over in silence."""
    hub, file = source == "dataset_name", source == "dataset_config"
    folder = source == "train_data_dir"
    fitting = {
        "in_json": (
            file or (folder and kind.conditioning == "caption"),
            "a folder of captioned images",
        ),
        "conditioning_data_dir": (folder, "--train_data_dir; a dataset file names it by itself"),
        "class_list": (kind.conditioning == "label", "a base with classes"),
        "label_column": (hub and kind.conditioning == "label", "labels of --dataset_name"),
        "image_column": (hub, "--dataset_name"),
        "dataset_config_name": (hub, "--dataset_name"),
    }
    for name, (fits, meant) in fitting.items():
        if getattr(options, name) and not fits:
            raise PatchError(
                f"expected --{name} only with {meant}, found it with --{source} and a base that "
                f"takes {kind.conditioning}: leave it out."
            )


def _find(source: str, options: DataOptions, kind: DataKind, split: Split) -> Found:
    if _is_digits(options):
        return find_digits(options, kind, split)
    find: dict[str, Callable[[DataOptions, DataKind], Found]] = {
        "train_data_dir": find_folder,
        "dataset_config": find_dataset_config,
        "dataset_name": find_huggingface,
    }
    return find[source](options, kind)


def _is_digits(options: DataOptions) -> bool:
    return options.dataset_name == DIGITS


def _holds_out(found: Found) -> bool:
    """Whether any images are kept for validation."""
    return any(sample.subset.validation[0] for sample in found.samples)


def _split(found: Found, split: Split) -> None:
    if split == "validation" and not _holds_out(found):
        raise _no_validation()
    found.samples, both = split_samples(found.samples, split == "validation")
    if both:
        found.notes.append(
            f"{both} images are not trained, because another data set keeps them for validation"
        )


def _no_validation() -> PatchError:
    return PatchError(
        "expected images for validation, found validation_split 0: give --validation_split, "
        "for example 0.05."
    )
