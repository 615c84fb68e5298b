"""What differs between the torch releases that hosts bring (2.1 and later)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# torch 2.1 has the function in another module; its compiler knows that one.
_place = torch.compiler if hasattr(torch.compiler, "is_compiling") else torch._utils
is_compiling: Callable[[], bool] = _place.is_compiling

_available = getattr(torch.amp, "is_autocast_available", lambda device: device in ("cpu", "cuda"))
# Devices that have autocast. Older releases have none on Apple's devices, where even switching it
# off is an error.
AUTOCAST = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if _available(device))

# Returns the stack of the `torch.func` transforms that are running, or None without any.
function_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack


def is_transforming() -> bool:
    """Tells whether forward-mode AD or a `torch.func` transform (jvp, vmap, grad) is running.

    Tensors then carry more than their values, so nothing may be cached or be read as a number.
    """
    return forward_ad._current_level >= 0 or function_transform() is not None
