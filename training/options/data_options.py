"""Options of the data: kohya's names wherever kohya has the thing. Imports no torch: `--help`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator

from training.options.declaring import option


class DataOptions(BaseModel):
    """Where the images are, what is cut out of them, what becomes of their captions."""

    train_data_dir: str | None = option(
        "data", None, "folder of images: with caption files, 10_name folders, or class folders"
    )
    in_json: str | None = option(
        "data", None, "JSON file of captions and tags for the images of --train_data_dir"
    )
    dataset_config: str | None = option("data", None, "kohya's dataset TOML, with subsets")
    webdataset: str | None = option(
        "data", None, "tar shards, paths or URLs: 'data/{00000..00099}.tar', several joined by ::"
    )
    dataset_name: str | None = option(
        "data", None, "Hugging Face dataset: a hub id, or a folder or file of one; or digits"
    )
    dataset_config_name: str | None = option("data", None, "configuration of --dataset_name")
    dataset_split: str = option("data", "train", "split of --dataset_name")
    image_column: str | None = option("data", None, "of --dataset_name (default: its images)")
    caption_column: str | None = option(
        "data", None, "of --dataset_name or metadata.jsonl (default: text, caption or prompt)"
    )
    label_column: str | None = option("data", None, "of --dataset_name (default: its class labels)")
    class_list: str | None = option(
        "data", None, "text file, one class name a line: line n (from 0) is class id n"
    )
    validation_split: float = option(
        "data", 0.0, "share of images kept for validation, the same whatever --seed", ge=0, lt=1
    )

    resolution: str | None = option(
        "image size", None, "of training: 512, or width,height (default: the base's own)"
    )
    enable_bucket: bool = option(
        "image size", False, "keep aspect ratios: batches of images of like shape"
    )
    min_bucket_reso: int | None = option(
        "image size", None, "shortest side of a bucket (default: half the resolution)", ge=1
    )
    max_bucket_reso: int | None = option(
        "image size", None, "longest side of a bucket (default: twice the resolution)", ge=1
    )
    bucket_reso_steps: int | None = option(
        "image size", None, "sides of buckets are multiples of it (default: the base's own)", ge=1
    )
    bucket_no_upscale: bool = option("image size", False, "never enlarge an image for its bucket")
    flip_aug: bool = option("image size", False, "mirror every second image, at random")
    random_crop: bool = option("image size", False, "crop anywhere instead of in the middle")
    color_aug: bool = option("image size", False, "vary hue and gamma a little, at random")

    caption_extension: str | None = option(
        "captions", None, "ending of caption files (default: .txt, else .caption)"
    )
    class_tokens: str | None = option("captions", None, "caption of images that have none")
    allow_empty_captions: bool = option(
        "captions", False, "train images without any caption on the empty one"
    )
    caption_dropout_rate: float = option(
        "captions", 0.1, "share of images trained without their caption or label", ge=0, le=1
    )
    caption_dropout_every_n_epochs: int = option(
        "captions", 0, "drop all captions in every n-th epoch, 0 for never", ge=0
    )
    caption_tag_dropout_rate: float = option(
        "captions", 0.0, "share of tags left out of a caption", ge=0, le=1
    )
    shuffle_caption: bool = option("captions", False, "shuffle the tags of a caption")
    keep_tokens: int = option("captions", 0, "first tags that stay where they are", ge=0)
    keep_tokens_separator: str = option(
        "captions", "", "tags before it stay (instead of --keep_tokens)"
    )
    caption_separator: str = option("captions", ",", "what separates tags")
    secondary_separator: str | None = option(
        "captions", None, "joins tags that move as one; becomes the separator"
    )
    caption_prefix: str | None = option("captions", None, "put before every caption")
    caption_suffix: str | None = option("captions", None, "put after every caption")
    enable_wildcard: bool = option(
        "captions", False, "draw one line of a caption file, and one of {a|b|c}"
    )

    train_batch_size: int = option("loading", 1, "images of one step and process", ge=1)
    max_data_loader_n_workers: int = option("loading", 0, "processes that load data", ge=0)
    persistent_data_loader_workers: bool = option(
        "loading", False, "keep these processes from epoch to epoch"
    )
    cache_latents: bool = option("loading", False, "encode every image once, keep it in memory")
    cache_latents_to_disk: bool = option("loading", False, "encode every image once, keep files")
    vae_batch_size: int = option("loading", 1, "images encoded at a time for the cache", ge=1)
    cache_text_encoder_outputs: bool = option(
        "loading", False, "encode every caption once, keep it in memory"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        "loading", False, "encode every caption once, keep files"
    )
    cache_dir: str | None = option(
        "loading", None, "folder of cache files (default: .dmp_cache in the data folder)"
    )
    shuffle_buffer: int = option(
        "loading", 1024, "shards: images among which the next are drawn", ge=1
    )
    skip_broken: bool = option(
        "loading", False, "shards: pass over unreadable images instead of stopping"
    )

    @field_validator("resolution", mode="before")
    @classmethod
    def _resolution_as_text(cls, value: Any) -> Any:
        """TOML files give a number or a pair, as kohya's do."""
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
