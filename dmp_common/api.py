"""What users see, assembled from the folders below."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dmp_common.patch.file import modelspec, read_patch_file, write_patch_file
from dmp_common.patch.patch import Patch


def load_patch(path: str | os.PathLike[str]) -> Patch:
    """Reads and checks a patch file; the patch is float32, on the CPU, in evaluation mode.

    Raises:
        PatchError: the file is missing, damaged, not a patch, or of an unknown version or
            variant; the message names the file, what was expected, what was found, what to do.
    """
    variant, tensors, metadata = read_patch_file(path)
    with torch.device("meta"):
        patch = Patch(variant)
    patch.to_empty(device="cpu")
    patch.load_tensors(tensors)  # copies
    patch.metadata = metadata
    return patch.eval()


def save_patch(
    patch: Patch,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a patch to a file, atomically; see `write_patch_file`.

    Returns:
        The file's hash, as hosts show it.
    """
    made = {**patch.metadata, **modelspec(patch.variant, Path(path)), **(metadata or {})}
    return write_patch_file(path, patch.variant, patch.tensors(), made, dtype)
