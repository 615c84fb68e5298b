"""The picture of a repair: the full model, the cheap one, the cheap one with the patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dmp_common.tools.drawing import GREY, INK, text_width, write

_CELL, _GAP, _MARGIN, _BLOCK = 80, 6, 20, 34  # pixels
_TITLE, _TEXT = 21, 16  # height of letters in pixels
_RED, _GREEN = (178, 34, 34), (28, 120, 60)


@dataclass(frozen=True)
class Row:
    """Pictures side by side with what is written beside them.

    Args:
        pictures: (columns, 3, H, W) in [0, 1].
        title: what made them.
        text: a second line.
        ink: colour of the second line.
    """

    pictures: Tensor
    title: str
    text: str = ""
    ink: tuple[int, int, int] = GREY


def repair_picture(
    full: Tensor,
    cheap: Tensor,
    patched: Tensor,
    strip: Tensor,
    *,
    cheap_name: str,
    gone: str,
    size: str,
) -> Image.Image:
    """One picture that shows what a patch repairs, for someone who reads nothing else.

    Three rows of pictures from equal noise, two rows with how far the second and third are from
    the first (red: the larger, the darker, on one scale), and a strip over the patch's strength.

    Args:
        full, cheap, patched: grey pictures (columns, 1, H, W) in [-1, 1].
        strip: pictures of one noise at rising strength (steps, 1, H, W); the first is strength 0
            and the last strength 1.
        cheap_name: of the cheap model.
        gone: how much of the damage is gone, such as "90 %".
        size: of the patch's file, such as "190 KB".
    """
    before, after = full - cheap, full - patched
    scale = float(torch.quantile(before.abs().flatten(), 0.98).clamp(min=1e-6))
    rows = [
        Row(on_paper(full), "full model"),
        Row(on_paper(cheap), cheap_name, "damaged", _RED),
        Row(on_paper(patched), f"{cheap_name} + patch", f"{size}; {gone} repaired", _GREEN),
        Row(in_red(before / scale), "what is wrong", "without the patch", _RED),
        Row(in_red(after / scale), "what is wrong", "with the patch", _GREEN),
        Row(on_paper(strip), "strength", "of the patch"),
    ]
    below = [f"{number / (len(strip) - 1):.2g}" for number in range(len(strip))]
    return _laid_out(rows, {3, 5}, below)


def on_paper(pictures: Tensor) -> Tensor:
    """Grey pictures (B, 1, H, W) in [-1, 1], bright on dark, as ink on paper (B, 3, H, W)."""
    return (1 - (pictures.clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1)


def in_red(differences: Tensor) -> Tensor:
    """Differences (B, 1, H, W) as colours (B, 3, H, W): white for none, red from 1 on."""
    strength = differences.abs().clamp(max=1)
    return torch.cat([1 - 0.15 * strength, 1 - strength, 1 - strength], dim=1)


def _laid_out(rows: Sequence[Row], after_space: set[int], below: Sequence[str]) -> Image.Image:
    """The rows below each other, wider apart above those of `after_space`."""
    words = [(row.title, _TITLE) for row in rows] + [(row.text, _TEXT) for row in rows]
    left = 2 * _MARGIN + max(text_width(text, size) for text, size in words)
    width = left + max(len(row.pictures) for row in rows) * (_CELL + _GAP) + _MARGIN
    height = 2 * _MARGIN + len(rows) * (_CELL + _GAP) + len(after_space) * _BLOCK + _TEXT + _GAP
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    top = _MARGIN
    for number, row in enumerate(rows):
        top += _BLOCK if number in after_space else 0
        middle = top + _CELL // 2
        write(canvas, row.title, (_MARGIN, middle - _TITLE - 2), _TITLE, ink=INK)
        write(canvas, row.text, (_MARGIN, middle + 4), _TEXT, ink=row.ink)
        for column, picture in enumerate(row.pictures):
            canvas.paste(_cell(picture), (left + column * (_CELL + _GAP), top))
        top += _CELL + _GAP
    for column, text in enumerate(below):
        write(
            canvas, text, (left + column * (_CELL + _GAP) + _CELL // 2, top), _TEXT, align="centre"
        )
    return canvas


def _cell(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1], smoothly enlarged to a cell, with a thin frame."""
    levels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    framed = Image.new("RGB", (_CELL, _CELL), (222, 222, 222))
    inside = Image.fromarray(levels).resize((_CELL - 2, _CELL - 2), Image.Resampling.BICUBIC)
    framed.paste(inside, (1, 1))
    return framed
