"""The bases of the small checkpoints that `checkpoints.py` makes; the server needs them too."""

from __future__ import annotations

from dmp_common import Base, families, register_base

WIDTH = 32  # channels of the UNet; SD 1.5 has ten times as many
CONTEXTS = {"tiny-a1111": 64, "narrow-a1111": 768}  # width of the text encoder


def register() -> dict[str, Base]:
    """Makes the bases known."""
    return {
        name: register_base(
            families.unet(
                name,
                widths=(WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH),
                context=context,
                attention=(True, True, True, False),
            )
        )
        for name, context in CONTEXTS.items()
    }
