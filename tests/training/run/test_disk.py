"""A full disk is told in one sentence, whichever library finds it; other errors stay."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dmp_common import PatchError
from training.run.disk import full_disk_explained

# What torch 2.13, safetensors 0.6 and Python raise where a disk of 300 KB is full.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_full_disk(error: Exception, tmp_path: Path) -> None:
    message = r"expected 3\.0 MiB free in .* for a state, found [\d,.]+ MiB: the disk is full"
    with (
        pytest.raises(PatchError, match=message),
        full_disk_explained(tmp_path, 3 * 2**20, "a state"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError("CUDA out of memory"),
        PatchError("found"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, full_disk_explained(tmp_path, 1, "a state"):
        raise error
    assert caught.value is error
