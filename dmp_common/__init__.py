"""Diffusion Model Patching: improve a frozen diffusion model with a small patch file.

Axes in all docstrings: T timesteps (or batch items), S sites, K prompt grids, N prompts of a
grid, D channels of a site, E size of the time embedding.

Source: Ham et al., "Diffusion Model Patching via Mixture-of-Prompts", AAAI 2025, arXiv 2405.17825.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dmp_common.errors import PatchError
from dmp_common.version import __version__

if TYPE_CHECKING:
    from dmp_common.api import (
        Attachment,
        Base,
        Context,
        Patch,
        Schedule,
        Settings,
        Site,
        Variant,
        attach,
        attached,
        detach,
        detect_base,
        get_base,
        importance_loss,
        known_bases,
        load_loss,
        register_base,
    )

__all__ = [
    "Attachment",
    "Base",
    "Context",
    "Patch",
    "PatchError",
    "Schedule",
    "Settings",
    "Site",
    "Variant",
    "__version__",
    "attach",
    "attached",
    "detach",
    "detect_base",
    "get_base",
    "importance_loss",
    "known_bases",
    "load_loss",
    "register_base",
]


class _Package(ModuleType):
    """This package, which loads torch only when a public name is used, so that help is fast."""

    if not TYPE_CHECKING:

        @property
        def attach(self) -> Any:
            """The function `attach`; `import` finds the folder of the same name."""
            return importlib.import_module("dmp_common.api").attach

        @attach.setter
        def attach(self, folder: ModuleType) -> None:
            """Ignores the folder, with which the import system would replace the function."""

        def __getattr__(self, name: str) -> Any:
            if name in __all__:
                return getattr(importlib.import_module("dmp_common.api"), name)
            if name in ("bases", "patch", "tools"):
                return importlib.import_module(f"dmp_common.{name}")
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
