"""From options to the rules of a subset: the same for the command line and for dataset files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dmp_common import PatchError
from training.data.captions.caption_rules import CaptionRules
from training.data.kind import DataKind
from training.data.samples import Subset
from training.data.sizes import Size, size_rules
from training.options.data_options import DataOptions

CAPTION_RULES = tuple(entry.name for entry in fields(CaptionRules))
SIZE_RULES = (
    *("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
    *("bucket_no_upscale", "flip_aug", "random_crop", "color_aug"),
)
_OTHERS = ("alpha_mask", "validation_split", "validation_seed")


def values_of(options: DataOptions) -> dict[str, Any]:
    """The options that a subset may have of its own, from a configuration."""
    return {name: getattr(options, name) for name in (*CAPTION_RULES, *SIZE_RULES, *_OTHERS)}


def make_subset(
    values: Mapping[str, Any],
    kind: DataKind,
    name: str,
    repeats: int = 1,
    *,
    masked: bool = False,
) -> Subset:
    """A subset from the values of its options.

    Raises:
        PatchError: sizes that the base cannot take, or options that contradict each other.
    """
    if values["color_aug"] and kind.channels != 3:
        raise PatchError("expected colour images for color_aug, found a base of grey ones.")
    if kind.conditioning == "none" and values["enable_wildcard"]:
        raise PatchError("expected captions for enable_wildcard, found a base that takes none.")
    sizes = {entry: values[entry] for entry in SIZE_RULES}
    sizes["resolution"] = parse_resolution(values["resolution"])
    captions = {entry: values[entry] for entry in CAPTION_RULES}
    return Subset(
        name,
        repeats,
        size_rules(kind, **sizes),
        CaptionRules(**captions),
        alpha_mask=values["alpha_mask"],
        masked=masked,
        batch=values.get("batch_size"),
        validation=(values["validation_split"] or 0.0, values["validation_seed"]),
    )


def parse_resolution(value: object) -> Size | None:
    """Width and height of `512`, `768,512`, `768x512` or [768, 512]; None stays None.

    Raises:
        PatchError: anything else.
    """
    if value is None:
        return None
    parts = list(value) if isinstance(value, list | tuple) else re.split(r"[,x]", str(value))
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        raise PatchError(
            f"expected a resolution such as 512 or 768,512 (width, height), found {value!r}."
        )
    return sides[0], sides[-1]
