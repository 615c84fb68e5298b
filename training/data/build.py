"""From options to data: `open_data` is where the trainer begins."""

from __future__ import annotations

from typing import Any, Literal

from dmp_common import PatchError
from training.data import draws
from training.data.batch import Batch, Data, DataSummary, Position
from training.data.caching.caches import plan_caches
from training.data.caching.encoding import Encoders
from training.data.indexed import Found, IndexedData
from training.data.items import Recipe
from training.data.kind import DataKind
from training.data.samples import Sample
from training.data.sources.dataset_config import find_dataset_config
from training.data.sources.digits import DIGITS, find_digits
from training.data.sources.folders import find_folder, require_captions
from training.data.sources.huggingface import find_huggingface
from training.data.stream.streaming import open_stream
from training.options.data_options import SOURCES

__all__ = ["Batch", "Data", "DataKind", "DataSummary", "Encoders", "Position", "open_data"]

Split = Literal["train", "validation", "test"]


def open_data(
    options: Any, kind: DataKind, encoders: Encoders | None, *, seed: int, split: Split
) -> Data:
    """One split of the data that options ask for. Every image's header is checked here.

    Args:
        options: has the fields of `DataOptions`.
        encoders: needed by `prepare_caches` only.
        seed: of order, augmentation and dropout; the split does not depend on it.
        split: "train" without the validation images, or these alone: not shuffled, mirrored or
            dropped. "test" is all images, as for validation; of the digits, their test split.

    Raises:
        PatchError: no data, several sources of data, broken images, missing captions or classes,
            or options that contradict each other; nothing is written then.
    """
    source = _source(options)
    _check_fitting(options, source, kind)
    if options.validation_split == 0 and split == "validation" and not _is_digits(options):
        raise PatchError(
            "expected images for validation, found validation_split 0: give --validation_split, "
            "for example 0.05."
        )
    if kind.conditioning == "label" and options.caption_dropout_rate and kind.null_label is None:
        raise PatchError(
            "expected --caption_dropout_rate 0 for a base without a label that means none, found "
            f"{options.caption_dropout_rate}: set it to 0."
        )
    if source == "webdataset":
        return open_stream(options, kind, seed, split)
    found = _find(source, options, kind, split)
    found.notes += require_captions(found.samples, kind, options)
    if not _is_digits(options):
        found.samples = _split(found.samples, options.validation_split, split)
    recipe = Recipe(kind, found.store, seed, augment=split == "train")
    subsets = {sample.subset for sample in found.samples}
    return IndexedData(found, recipe, plan_caches(options, kind, encoders, subsets, found.folder))


def _source(options: Any) -> str:
    given = [name for name in SOURCES if getattr(options, name)]
    if len(given) == 1:
        return given[0]
    if given:
        both = " and ".join(f"--{name}" for name in given)
        raise PatchError(f"expected one source of data, found {both}: give one of them.")
    raise PatchError(
        "expected data to train on, found none. Give one of:\n"
        "  --train_data_dir photos   (a folder of images, photo.txt beside photo.jpg)\n"
        "  --dataset_config dataset.toml   (kohya's file of subsets)\n"
        '  --webdataset "shards/{00000..00099}.tar"   (paths or URLs)\n'
        "  --dataset_name user/dataset   (Hugging Face)\n"
        "docs/DATA.md shows how each is laid out."
    )


def _check_fitting(options: Any, source: str, kind: DataKind) -> None:
    """Refuses options that this source or base would pass over in silence."""
    folder, hub = source == "train_data_dir", source == "dataset_name"
    fitting = {
        "in_json": (folder and kind.conditioning == "caption", "a folder of captioned images"),
        "class_list": (kind.conditioning == "label", "a base with classes"),
        "label_column": (hub and kind.conditioning == "label", "labels of --dataset_name"),
        "image_column": (hub, "--dataset_name"),
        "dataset_config_name": (hub, "--dataset_name"),
        "skip_broken": (source == "webdataset", "--webdataset"),
    }
    for name, (fits, meant) in fitting.items():
        if getattr(options, name) and not fits:
            raise PatchError(
                f"expected --{name} only with {meant}, found it with --{source} and a base that "
                f"takes {kind.conditioning}: leave it out."
            )


def _find(source: str, options: Any, kind: DataKind, split: Split) -> Found:
    if _is_digits(options):
        return find_digits(options, kind, split)
    find = {"train_data_dir": find_folder, "dataset_config": find_dataset_config,
            "dataset_name": find_huggingface}  # fmt: skip
    return find[source](options, kind)


def _is_digits(options: Any) -> bool:
    return bool(options.dataset_name == DIGITS)


def _split(samples: list[Sample], share: float, split: Split) -> list[Sample]:
    """Training or validation images: by a hash of the key, so that no other image matters.

    A split that would leave no image to one side gives it the one nearest to the border.
    """
    if not share or split == "test":
        return samples
    ranks = [draws.uniform("validation", sample.origin or sample.key) for sample in samples]
    ordered = sorted(set(ranks))
    if len(ordered) < 2:
        raise PatchError("expected two images to split, found one: leave out --validation_split.")
    border = min(max(share, ordered[1]), ordered[-1])
    chosen = [(rank < border) == (split == "validation") for rank in ranks]
    return [sample for sample, keep in zip(samples, chosen, strict=True) if keep]
