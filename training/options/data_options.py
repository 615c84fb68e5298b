"""Options of the data: kohya's names wherever kohya has the thing. Imports no torch: `--help`."""

from __future__ import annotations

import codecs
from typing import Any

from pydantic import field_validator

from training.options.declaring import Options, option

# Options that name a source of data; a run needs exactly one of them.
SOURCES = ("train_data_dir", "dataset_config", "webdataset", "dataset_name")


class DataOptions(Options):
    """Where the images are, how they are cropped, and what becomes of their captions."""

    train_data_dir: str | None = option(
        "data",
        None,
        "Train on the images in this folder: with caption files beside them, with kohya's "
        "10_name folders, or with one folder for each class.",
        common=True,
    )
    in_json: str | None = option(
        "data",
        None,
        "Read the captions and tags of the images in --train_data_dir from this JSON file.",
    )
    dataset_config: str | None = option(
        "data",
        None,
        "Read data sets and subsets from this TOML file, as kohya's scripts do.",
        common=True,
    )
    webdataset: str | None = option(
        "data",
        None,
        "Train on these tar shards, given as paths or URLs such as 'data/{00000..00099}.tar'. "
        "Join several with ::.",
    )
    dataset_name: str | None = option(
        "data",
        None,
        "Train on this Hugging Face dataset: a hub id, or a folder or file that holds one. The "
        "name digits means the digits of scikit-learn.",
        common=True,
    )
    dataset_config_name: str | None = option(
        "data", None, "Use this configuration of --dataset_name, where it has several."
    )
    dataset_split: str = option("data", "train", "Use this split of --dataset_name.", min_length=1)
    image_column: str | None = option(
        "data",
        None,
        "Take the images from this column of --dataset_name. By default the column is found by "
        "its type.",
    )
    caption_column: str | None = option(
        "data",
        None,
        "Take the captions from this column of --dataset_name or metadata.jsonl. By default it "
        "is text, caption or prompt.",
    )
    label_column: str | None = option(
        "data",
        None,
        "Take the classes from this column of --dataset_name. By default the column is found by "
        "its type.",
    )
    class_list: str | None = option(
        "data",
        None,
        "Read the names of the classes from this text file, one a line: line n, from 0, is "
        "class id n.",
    )
    validation_split: float | None = option(
        "data",
        None,
        "Keep this share of the images for validation, the same images whatever --seed is; 0 "
        "keeps none. By default a twentieth is kept, 8 to 64 images, where there are 40 or "
        "more.",
        ge=0,
        lt=1,
        common=True,
    )
    validation_seed: int | None = option(
        "data",
        None,
        "Choose other images for validation; without it the choice is always the same.",
    )
    conditioning_data_dir: str | None = option(
        "data",
        None,
        "Take masks from this folder, where they have the names of the images: white counts in "
        "the loss, black does not.",
    )
    verify_images: bool = option(
        "data", False, "Decode every image once before the run, and remember which ones are whole."
    )
    max_broken: int = option(
        "data",
        10,
        "Skip and list at most this many broken images; 0 stops at the first one.",
        ge=0,
    )
    skip_broken: bool = option(
        "data",
        False,
        "Skip every image that is broken or has no caption or class, however many there are.",
    )

    resolution: str | None = option(
        "image size",
        None,
        "Train at this image size in pixels: one side such as 512, or width,height. By default "
        "it is the size of the base.",
        common=True,
    )
    enable_bucket: bool = option(
        "image size",
        False,
        "Keep aspect ratios: make batches of images of similar shape instead of squares.",
        common=True,
    )
    min_bucket_reso: int | None = option(
        "image size",
        None,
        "Make no side of a bucket shorter than this many pixels. By default it is half the "
        "resolution.",
        ge=1,
    )
    max_bucket_reso: int | None = option(
        "image size",
        None,
        "Make no side of a bucket longer than this many pixels. By default it is twice the "
        "resolution.",
        ge=1,
    )
    bucket_reso_steps: int | None = option(
        "image size",
        None,
        "Make the sides of buckets multiples of this many pixels. By default the base decides.",
        ge=1,
    )
    bucket_no_upscale: bool = option(
        "image size", False, "Never enlarge an image to fit its bucket."
    )
    flip_aug: bool = option("image size", False, "Mirror each image with probability one half.")
    random_crop: bool = option(
        "image size", False, "Crop images at a random place instead of the centre."
    )
    color_aug: bool = option("image size", False, "Vary hue and gamma slightly at random.")
    alpha_mask: bool = option(
        "image size", False, "Weight the loss of every pixel by the opacity of the image there."
    )

    caption_extension: str | None = option(
        "captions",
        None,
        "Read captions from files with this ending. By default it is .txt, else .caption.",
    )
    caption_encoding: str = option(
        "captions",
        "utf-8",
        "Read caption files in this encoding, such as cp1252; a byte order mark is recognised.",
    )
    class_tokens: str | None = option(
        "captions", None, "Use this caption for the images that have none."
    )
    allow_empty_captions: bool = option(
        "captions", False, "Train images without a caption on the empty caption."
    )
    caption_dropout_rate: float = option(
        "captions",
        0.1,
        "Train this share of the images without their caption or class.",
        ge=0,
        le=1,
    )
    caption_dropout_every_n_epochs: int = option(
        "captions", 0, "Drop all captions in every n-th epoch; 0 disables this.", ge=0
    )
    caption_tag_dropout_rate: float = option(
        "captions", 0.0, "Leave this share of the tags out of a caption.", ge=0, le=1
    )
    shuffle_caption: bool = option("captions", False, "Shuffle the tags of a caption.")
    keep_tokens: int = option(
        "captions",
        0,
        "Neither shuffle nor drop this many tags at the beginning of a caption.",
        ge=0,
    )
    keep_tokens_separator: str = option(
        "captions", "", "Keep the tags before this text in place; it replaces --keep_tokens."
    )
    caption_separator: str = option(
        "captions", ",", "Split captions into tags at this text.", min_length=1
    )
    secondary_separator: str | None = option(
        "captions",
        None,
        "Move tags that are joined by this text together; --caption_separator then replaces it.",
    )
    caption_prefix: str | None = option("captions", None, "Put this text before every caption.")
    caption_suffix: str | None = option("captions", None, "Put this text after every caption.")
    enable_wildcard: bool = option(
        "captions",
        False,
        "Draw one line of a caption file with several, and one alternative of {a|b|c}.",
    )

    train_batch_size: int = option(
        "loading",
        1,
        "Let each process take this many images at once. --global_batch_size or "
        "--gradient_accumulation_steps decides how many images make a step.",
        ge=1,
        common=True,
    )
    max_data_loader_n_workers: int = option(
        "loading",
        0,
        "Load images in this many processes; 0 loads them in the training process.",
        ge=0,
    )
    persistent_data_loader_workers: bool = option(
        "loading", False, "Keep these processes from one epoch to the next."
    )
    cache_latents: bool = option(
        "loading",
        False,
        "Encode every image once with the VAE and keep the latents in memory.",
        common=True,
    )
    cache_latents_to_disk: bool = option(
        "loading", False, "Encode every image once with the VAE and keep the latents in files."
    )
    vae_batch_size: int = option(
        "loading", 1, "Let the VAE encode this many images at once for the cache.", ge=1
    )
    cache_text_encoder_outputs: bool = option(
        "loading",
        False,
        "Encode every caption once and keep the result in memory, without the text encoders.",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        "loading",
        False,
        "Encode every caption once and keep the result in files, without the text encoders.",
    )
    cache_dir: str | None = option(
        "loading",
        None,
        "Keep cache files in this folder. By default it is .dmp_cache in the data folder.",
    )
    shuffle_buffer: int = option(
        "loading", 1024, "Draw the next image of shards from this many.", ge=1
    )

    @field_validator("caption_encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError as error:
            raise ValueError(
                "expected the name of an encoding that Python knows, such as utf-8 or cp1252"
            ) from error
        return value

    @field_validator("resolution", mode="before")
    @classmethod
    def _resolution_as_text(cls, value: Any) -> Any:
        """TOML files give a number or a pair, as kohya's do."""
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("caption_extension")
    @classmethod
    def _is_an_ending(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip(".") or set(value) & set("/\\\0")):
            raise ValueError("expected an ending such as .txt")
        return value


def several_sources(given: list[str]) -> str:
    """The sentence about a configuration that names more than one source of data."""
    both = " and ".join(f"--{name}" for name in given)
    return f"expected one source of data, found {both}: give one of them."


def named_sources(options: DataOptions) -> list[str]:
    """The options that name the source of data: one, where a configuration makes sense.

    A dataset file names its images by itself, so that `train_data_dir` beside it is not used, as
    with kohya's scripts.
    """
    given = [name for name in SOURCES if getattr(options, name)]
    return ["dataset_config"] if given == ["train_data_dir", "dataset_config"] else given
