"""What differs between the torch releases that hosts bring (2.1 and later)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

# torch 2.1 has the function, and its compiler knows it, but in another place.
_place = torch.compiler if hasattr(torch.compiler, "is_compiling") else torch._utils
is_compiling: Callable[[], bool] = _place.is_compiling

_available = getattr(torch.amp, "is_autocast_available", lambda device: device in ("cpu", "cuda"))
_AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if _available(device))


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Full precision inside of whatever autocast region there is.

    Older releases have no autocast on some devices (Apple's) and refuse even to switch it off.
    """
    return torch.autocast(device_type, enabled=False) if device_type in _AUTOCAST else nullcontext()
