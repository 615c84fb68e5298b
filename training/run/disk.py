"""A full disk: found before the training where possible, and told in one sentence where not."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dmp_common import PatchError

MIB = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch (inline_container is its writer) and safetensors hide the error number in their text.
_TEXTS = ("no space left", "disk quota", "file too large", "inline_container")


@contextmanager
def full_disk_explained(folder: Path, needed: int, what: str) -> Iterator[None]:
    """Turns the errors of a full disk into one sentence.

    Args:
        folder: where the block writes.
        needed: bytes that it writes, about.
        what: it writes, in words.

    Raises:
        PatchError: the disk is full; what was there before is still there.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, PatchError) or not _is_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise PatchError(
            f"expected {mib(needed)} free in {folder} for {what}, found {mib(free)}: the disk "
            "is full. What was saved before is whole. Make room, then go on with --resume latest "
            "(with --save_state), or save less often (--save_last_n_steps)."
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error).lower() for text in _TEXTS)


def mib(count: int) -> str:
    """Bytes in MiB, for a message."""
    return f"{count / MIB:,.1f} MiB"
