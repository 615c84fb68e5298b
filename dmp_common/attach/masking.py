"""Limits what a patch does in a forward call to a part of the picture."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from dmp_common.attach.context import Context, TokenPlace, place_of
from dmp_common.attach.modulation import Part
from dmp_common.bases.parts import Site
from dmp_common.errors import PatchError

# Outputs for text, whose sequences may be as long as the picture's: joint models have text streams
# of their own, and cross-attention computes keys and values from the text.
_TEXT = re.compile(r"(^|\.)text\.|(^|\.)attn2\.to_[kv]$")


class MaskedContext:
    """A call's context with a mask: it changes x to x + mask * (changed - x).

    The mask is resized to each site's grid. Outputs without a place in the picture (text, the
    time embedding) are changed by the share of the picture that the mask covers.

    Args:
        context: the context of the call, without a mask.
        mask: (B or 1, 1, H, W), from 0 to 1, on the device of the call. It covers the latent, whose
            size the context knows.
        stride: latent pixels per image token, in each direction; None where sites are feature maps.
    """

    def __init__(self, context: Context, mask: Tensor, stride: int | None) -> None:
        self.context = context
        self.mask = mask
        self._stride = stride

    def around(self, context: Context) -> MaskedContext:
        """Returns the same mask around another context of the call."""
        return MaskedContext(context, self.mask, self._stride)

    def add(self, site: str, x: Tensor) -> Tensor:
        """Returns the block's input with the site's field added where the mask is; see `Context`.

        Args:
            site: name of the site.
            x: the input, as for `Context.add`.
        """
        changed = self.context.add(site, x)
        if changed is x:
            return x
        return self._mixed(x, changed, self.context.sites[site])

    def modulate(self, parts: tuple[Part, ...], x: Tensor) -> Tensor:
        """Returns a module's output, scaled and shifted where the mask is; see `Context`.

        Args:
            parts: the sites whose channels the output holds.
            x: the output, as for `Context.modulate`.
        """
        before = x.clone()  # without gradients x itself is changed
        changed = self.context.modulate(parts, x)
        return self._mixed(before, changed, self.context.sites[parts[0].site])

    def _mixed(self, x: Tensor, changed: Tensor, site: Site) -> Tensor:
        weights = self._weights(x, site).to(x.dtype)
        if len(weights) not in (1, len(x)):
            if len(x) % len(weights):
                raise PatchError(
                    f"expected a batch of {len(weights)} pictures, as many as masks, found "
                    f"{len(x)}: give one mask for all, or one for each."
                )
            weights = weights.repeat_interleave(len(x) // len(weights), dim=0)
        return torch.lerp(x, changed, weights)  # exact where the mask is 0 or 1

    def _weights(self, x: Tensor, site: Site) -> Tensor:
        """Returns the mask in a shape that fits x: (B or 1, 1, H, W), (B or 1, L, 1) or ones."""
        if x.dim() == 4 and (site.place == "input" or site.axis == 1):
            return _resized(self.mask, (x.shape[2], x.shape[3]))
        mean = self.mask.mean((2, 3))  # (B or 1, 1)
        if x.dim() != 3:
            return mean.reshape(-1, *[1] * (x.dim() - 1))
        length = x.shape[1]
        place = None if _TEXT.search(site.name) else self._place(length)
        if place is None:
            return mean[:, :, None]
        size, start, own = place
        picture = _resized(self.mask, size).flatten(1)[:, :, None]  # (B or 1, tokens, 1)
        picture = picture.repeat(1, length // picture.shape[1] if own is None else 1, 1)  # frames
        if own is None:
            return picture
        if isinstance(start, int):
            return _among(picture, mean, start, length)
        pictures, means = picture.expand(len(start), -1, -1), mean.expand(len(start), -1)
        items = zip(torch.split(pictures, 1), torch.split(means, 1), start, strict=True)
        return torch.cat([_among(one, rest, first, length) for one, rest, first in items])

    def _place(self, length: int) -> TokenPlace | None:
        """Returns where the picture is in a sequence, None where it is not in it."""
        latent, shared = self.context.latent, self.context.shared
        if latent is None:
            return None
        if self._stride is None:
            size = _level(length, *latent.size)
            return None if size is None else (size, 0, None)
        place = place_of(latent, self._stride, shared, length)
        if place is None and length == latent.image_tokens:  # blocks that see the picture alone
            return place_of(replace(latent, text_tokens=None), self._stride, shared, length)
        return place


def _among(picture: Tensor, mean: Tensor, start: int, length: int) -> Tensor:
    """Returns the weights of a sequence (B, length, 1) of which the picture is a part."""
    weights = mean[:, :, None].repeat(1, length, 1)
    weights[:, start : start + picture.shape[1]] = picture
    return weights


def _level(length: int, height: int, width: int) -> tuple[int, int] | None:
    """Returns the rows and columns of a UNet's level with so many places, None if there is none.

    A UNet halves its latent and rounds up. Where another extension shrinks it (deep shrink), the
    size in the latent's proportions that has so many places is taken.

    >>> _level(32, 16, 8), _level(21, 14, 5), _level(18, 16, 8), _level(77, 64, 64)
    ((8, 4), (7, 3), (6, 3), None)
    """
    rows, columns = height, width
    while rows * columns > length:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        if (rows, columns) == (1, 1):
            break
    if rows * columns == length:
        return rows, columns
    rows = round(math.sqrt(length * height / width))
    if rows and length % rows == 0 and abs(length / rows / rows * height / width - 1) < 0.25:
        return rows, length // rows
    return None


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns a mask (B, 1, H, W) in another size: each place gets the mean of what it covers."""
    return mask if mask.shape[2:] == size else functional.interpolate(mask, size, mode="area")
