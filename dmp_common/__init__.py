"""Diffusion Model Patching: improve a frozen diffusion model with a small patch file.

Axes in all docstrings: T timesteps (or batch items), S sites, K prompt grids, N prompts of a
grid, D channels of a site, E size of the time embedding.

Source: Ham et al., "Diffusion Model Patching via Mixture-of-Prompts", AAAI 2025, arXiv 2405.17825.
"""

from dmp_common.attach.context import Context, Settings
from dmp_common.attach.hooks import Attachment, attach
from dmp_common.bases.base import Base, Site
from dmp_common.bases.detect import detect_base
from dmp_common.bases.schedule import Schedule
from dmp_common.bases.table import get_base, known_bases, register_base
from dmp_common.errors import PatchError
from dmp_common.patch.balancing import importance_loss, load_loss
from dmp_common.patch.patch import Patch
from dmp_common.patch.variant import Variant
from dmp_common.version import __version__

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
    "detect_base",
    "get_base",
    "importance_loss",
    "known_bases",
    "load_loss",
    "register_base",
]
