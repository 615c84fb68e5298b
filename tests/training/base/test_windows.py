"""How much of a caption each family's text encoders read."""

from __future__ import annotations

from typing import Any

import pytest

from dmp_common import get_base
from training.base.families.table import family_of
from training.options.command_line import resolve


@pytest.mark.parametrize(
    ("base", "options", "window"),
    [
        ("sd15", {}, 75), ("sd15", {"max_token_length": 225}, 225),
        ("sdxl", {"max_token_length": 150}, 150), ("pixart", {}, 299), ("sd3", {}, 255),
        ("flux", {}, 511), ("chroma", {}, 511),
        ("krea2", {}, 507), ("qwen-image-2.1", {}, 504), ("anima", {}, 511),
        ("flux", {"t5_max_token_length": 128}, 127),
        ("dit-b/2", {"text_conditional": True}, 75),
    ],
)  # fmt: skip
def test_windows(base: str, options: dict[str, Any], window: int) -> None:
    config = resolve({"base": base, **options})
    assert family_of(get_base(base)).window(config) == window
