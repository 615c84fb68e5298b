"""The base of the tiny checkpoints that `checkpoints.py` makes; the server needs it too."""

from __future__ import annotations

from dmp_common import Base, families, register_base

NAME = "tiny-a1111"
WIDTH, TEXT = 32, 64  # channels of the UNet and of the text encoder


def register() -> Base:
    """Makes the base known; the real SD 1.5 has ten times its width."""
    return register_base(
        families.unet(
            NAME,
            widths=(WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH),
            context=TEXT,
            attention=(True, True, True, False),
        )
    )
