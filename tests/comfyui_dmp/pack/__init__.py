"""A custom node for the tests' own server: the reduced bases, and captions at random.

It stands beside the repository in `custom_nodes`; `DMP_ROOT` is the repository.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

ROOT = Path(os.environ["DMP_ROOT"])


def _register() -> None:
    """The core as the repository's own entry loads it, whichever comes first."""
    spec = importlib.util.spec_from_file_location("dmp_entry", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    entry._load("dmp_common")
    from dmp_common import bases, register_base

    register_base(bases.sd3("test-sd3", depth=2, width=128, dual=False, hub_id=None))
    register_base(bases.flux("test-flux", double=1, single=2, width=3072, hub_id=None))
    register_base(bases.pixart("test-pixart", depth=2, width=1152, hub_id=None))


class RandomConditioning:
    """A caption's embedding of any size, instead of gigabytes of text encoders."""

    CATEGORY = "test"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The node's inputs."""
        names = ("seed", "tokens", "width", "pooled")
        return {"required": {name: ("INT", {"default": 1, "min": 0}) for name in names}}

    def make(self, seed: int, tokens: int, width: int, pooled: int) -> tuple[list[Any]]:
        """A caption (1, tokens, width) and its summary (1, pooled)."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, width, generator=generator)
        return ([[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


_register()
NODE_CLASS_MAPPINGS = {"DMPTest_RandomConditioning": RandomConditioning}
