"""Which base are these weights? For --base auto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from dmp_common import Base, PatchError, detect_base, known_bases
from dmp_common.bases.detect import bases_of_shapes, stranger_of_shapes
from dmp_common.bases.otherfamilies import Stranger
from training.base.families.checkpoint import shapes_of
from training.base.places import Source, explained, require_known


def detect_source(source: Source) -> Base:
    """The base of some weights, by their structure; no values are read.

    Raises:
        PatchError: weights of no known base, or a hub id whose configuration tells nothing.
    """
    require_known(source)
    path = Path(source.place)
    if not path.exists():
        return _of_repository(source.place)
    shapes = shapes_of(path)
    found = bases_of_shapes(shapes)
    if not found:
        raise _unknown(source.place, stranger_of_shapes(shapes))
    return found[0]


def _of_repository(place: str) -> Base:
    """From the configuration alone: the model is built without memory for its weights."""
    with explained("the configuration of a denoiser", place, "--pretrained_model_name_or_path"):
        config = _config_of_repository(place)
        with torch.device("meta"):
            cls: Any = getattr(diffusers, config["_class_name"])
            return detect_base(cls.from_config(config))


def _config_of_repository(place: str) -> dict[str, Any]:
    """The configuration of its transformer or UNet.

    Raises:
        OSError: there is neither, or no connection.
    """
    model: Any = diffusers.UNet2DConditionModel  # any class can read any configuration
    try:
        return dict(model.load_config(place, subfolder="transformer"))
    except OSError:
        return dict(model.load_config(place, subfolder="unet"))


def _unknown(place: str, stranger: Stranger | None) -> PatchError:
    names = ", ".join(base.name for base in known_bases())
    if stranger is None:
        return PatchError(
            f"expected weights of one of the bases {names}, found others at {place}: say which "
            "with --base, or choose other weights."
        )
    return PatchError(
        f"expected weights of one of the bases {names}, found those of {stranger.name}, which is "
        f"not supported, at {place}: choose other weights."
    )
