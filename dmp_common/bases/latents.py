"""What a call of a model says about its latent: how many, how large, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from dmp_common.bases.base import Base, grid_cells
from dmp_common.errors import PatchError


@dataclass(frozen=True)
class Latent:
    """The latents of one call.

    Args:
        batch: items.
        size: height and width.
        image_tokens, text_tokens: see `Context`.
    """

    batch: int
    size: tuple[int, int]
    image_tokens: int | None = None
    text_tokens: int | tuple[int, ...] | None = None


def latent_of(
    base: Base, sample: Any, positions: Any, mask: Any, multiple: int | None = None
) -> Latent:
    """The latents of a call of a model.

    Args:
        sample: its input: (B, C, H, W); packed tokens (B, L, D); or a list of (C, 1, H, W), whose
            tokens come before the text (Z-Image in diffusers).
        positions: what its argument `base.positions` holds, for packed tokens.
        mask: what its argument `base.caption_mask` holds, (B, L).
        multiple: see `tokens_multiple`.

    Raises:
        PatchError: latents of different sizes in one batch, or of several frames.
    """
    if isinstance(sample, (list, tuple)):
        return Latent(len(sample), _common_size(sample, base), text_tokens=0)
    batch = len(sample)
    if sample.dim() == 3:
        return Latent(batch, _packed_size(positions), image_tokens=sample.shape[1])
    size = sample.shape[-2], sample.shape[-1]
    if mask is not None:
        lengths = tuple(int(length) for length in mask.sum(dim=1).tolist())
        return Latent(batch, size, text_tokens=lengths if len(set(lengths)) > 1 else lengths[0])
    return Latent(batch, size, image_tokens=padded_tokens(base, size, multiple))


def tokens_multiple(denoiser: nn.Module) -> int | None:
    """To whole multiples of what a host's model fills its tokens up (Z-Image), None if not."""
    multiple = getattr(denoiser, "pad_tokens_multiple", None)
    return multiple if isinstance(multiple, int) else None


def padded_tokens(base: Base, size: tuple[int, int], multiple: int | None) -> int | None:
    """Image tokens with those that fill them up; None where nothing does."""
    if multiple is None:
        return None
    stride = base.sites[0].stride
    rows, columns = (grid_cells(side + stride - 1, stride) for side in size)
    return -(-rows * columns // multiple) * multiple


def _common_size(sample: Any, base: Base) -> tuple[int, int]:
    """Height and width of a list of latents."""
    shapes = [tuple(item.shape) if isinstance(item, Tensor) else type(item) for item in sample]
    first = shapes[0]
    if not isinstance(first, tuple) or len(first) != 4 or first[1] != 1 or len(set(shapes)) > 1:
        found = ", ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise PatchError(
            f"expected latents of one size (C, 1, H, W) in a batch of base {base.name}, found "
            f"{found}: give pictures of different sizes, or with references, in calls of their own."
        )
    return first[2], first[3]


def _packed_size(positions: Any) -> tuple[int, int]:
    """Height and width of a latent packed 2 x 2.

    Args:
        positions: position ids (B, L, 3) or (L, 3); or shapes (frames, rows, columns), one of each
            item or a list of each with those of reference pictures after its own.
    """
    if isinstance(positions, Tensor):
        ids = positions.reshape(-1, 3)
        own = ids[ids[:, 0] == 0]  # reference pictures (Kontext) have another first id
        rows, columns = (int(own[:, axis].max()) + 1 for axis in (1, 2))
        return 2 * rows, 2 * columns
    first = positions
    while not isinstance(first[0], int):
        first = first[0]
    return 2 * first[1], 2 * first[2]
