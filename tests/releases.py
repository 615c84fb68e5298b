"""Which families the installed packages can train."""

from __future__ import annotations

import importlib.util

import diffusers

from dmp_common import Base, PatchError
from training.base.families.family import Family
from training.base.releases import require_releases

LACKING = "needs later releases of diffusers and transformers"


def trainable(base: Base, family: Family) -> bool:
    """Whether the trainer takes a base here."""
    try:
        require_releases(base, family)
    except PatchError:
        return False
    # Before 0.37 diffusers takes ftfy for granted, with which it cleans the captions of Wan.
    cleans = family.pipeline.startswith("Wan") and diffusers.__version__ < "0.37"
    return not cleans or importlib.util.find_spec("ftfy") is not None
