"""The floating-point types by the names that --mixed_precision and --save_precision give them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "no": torch.float32,  # kohya's name of full precision in --mixed_precision
    "float": torch.float32,  # and in --save_precision
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
