"""What differs between the torch releases that hosts bring (2.1 and later)."""

from __future__ import annotations

from collections.abc import Callable

import torch

# torch 2.1 has the function, and its compiler knows it, but in another place.
_place = torch.compiler if hasattr(torch.compiler, "is_compiling") else torch._utils
is_compiling: Callable[[], bool] = _place.is_compiling
