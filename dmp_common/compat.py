"""What differs between the torch releases that hosts bring (2.1 and later)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# torch 2.1 has the function, and its compiler knows it, but in another place.
_place = torch.compiler if hasattr(torch.compiler, "is_compiling") else torch._utils
is_compiling: Callable[[], bool] = _place.is_compiling

_available = getattr(torch.amp, "is_autocast_available", lambda device: device in ("cpu", "cuda"))
# Devices that have autocast. Older releases have none on Apple's and refuse even to switch it off.
AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if _available(device))

# The stack of `torch.func` transforms that are under way, None where there are none.
function_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack


def is_transforming() -> bool:
    """Tells whether forward-mode AD or a `torch.func` transform (jvp, vmap, grad) is under way.

    Tensors then stand for more than their values: nothing may be remembered, or be read as a
    number.
    """
    return forward_ad._current_level >= 0 or function_transform() is not None
