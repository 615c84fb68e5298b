"""placeholder while being written"""

from __future__ import annotations

import os
from pathlib import Path


def resolve(source: str | os.PathLike[str], **options: object) -> Path:
    return Path(source)
