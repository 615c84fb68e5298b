"""Which releases of diffusers and transformers a family needs."""

from __future__ import annotations

import diffusers
import transformers

from dmp_common import Base, PatchError
from training.base.families.family import Family


def require_releases(base: Base, family: Family) -> None:
    """Refuses a base that the installed packages do not know, or compute otherwise than later ones.

    Raises:
        PatchError: a package is too old, or missing.
    """
    ours = (family.model, family.pipeline, family.conditioner)
    missing = [name for name in ours if name and not hasattr(diffusers, name)]
    if missing or _release(diffusers.__version__) < _release(family.since):
        without = f", which has no {missing[0]}" if missing else ""
        raise PatchError(
            f"expected diffusers {family.since} or later for base {base.name}, found "
            f"{diffusers.__version__}{without}: pip install -U diffusers."
        )
    unknown = [name for name in family.encoders.values() if not hasattr(transformers, name)]
    if unknown:
        raise PatchError(
            f"expected a release of transformers with {unknown[0]} for base {base.name}, found "
            f"{transformers.__version__}: pip install -U transformers."
        )
    family.require_packages()


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])
