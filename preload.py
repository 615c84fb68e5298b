"""A1111 and Forge read their command line's options from here."""

from __future__ import annotations

import argparse


def preload(parser: argparse.ArgumentParser) -> None:
    """Adds our options to the host's."""
    parser.add_argument(
        "--dmp-dir",
        default=None,
        help="folder with DMP patches (Diffusion Model Patching); models/DMP unless given",
    )
