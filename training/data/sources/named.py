"""Whether the places of data that options name are on this disk."""

from __future__ import annotations

from pathlib import Path

from training.options.config import TrainConfig
from training.options.data_options import named_sources, several_sources
from training.options.dataset_file import read_dataset_file
from training.options.problems import ConfigError


def require_places(config: TrainConfig) -> None:
    """Refuses several sources of data, and places of theirs that are not on this disk.

    Raises:
        ConfigError: a line for each of them.
    """
    given = named_sources(config)
    problems = [several_sources(given)] if len(given) > 1 else []
    for name, what, exists in (
        ("train_data_dir", "a folder of images", Path.is_dir),
        ("in_json", "a JSON file", Path.is_file),
        ("conditioning_data_dir", "a folder of masks", Path.is_dir),
        ("class_list", "a text file", Path.is_file),
    ):
        place = getattr(config, name)
        if place is not None and not exists(Path(place).expanduser()):
            problems.append(f"expected {what} at {place}, found none: check --{name}.")
    if problems:
        raise ConfigError(*problems)


def require_dataset_file(config: TrainConfig) -> None:
    """Refuses a file of data sets that cannot be used.

    Raises:
        PatchError: all that is wrong with it.
    """
    if config.dataset_config is not None:
        read_dataset_file(Path(config.dataset_config))
