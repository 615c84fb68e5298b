"""Pictures of a training: the curve of the loss, and models side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image, ImageDraw
from torch import Tensor

from dmp_common.tools import drawing

_SIZE, _BOX = (760, 430), (110, 90, 720, 340)  # of the curve: the picture, and its panel
_PALE, _DARK = (170, 190, 215), (30, 70, 130)
_LABEL = 44  # pixels above a picture


def loss_curve(shares: Sequence[float], steps: int, title: str) -> Image.Image:
    """Draws the share of the gap that is left, by step, and its running mean.

    Args:
        shares: the loss of each step so far over the gap before training.
        steps: of the whole training.
        title: a line above.
    """
    image = Image.new("RGB", _SIZE, (255, 255, 255))
    left, top, right, bottom = _BOX
    drawing.write(image, title, (left, 20))
    drawing.write(image, "share of the gap that is left", (left, 54), ink=drawing.GREY)
    values = np.array(shares if len(shares) else [1.0], dtype=np.float32)
    highest = 1.05 * max(1.0, float(values.max()))
    painter = ImageDraw.Draw(image)
    across = (right - left) / max(steps - 1, 1)

    def points(heights: np.ndarray) -> list[tuple[float, float]]:  # type: ignore[type-arg]
        height = (bottom - top) / highest
        return [(left + n * across, bottom - float(y) * height) for n, y in enumerate(heights)]

    marks = [((bottom - top) * (1 - value / highest), f"{value:g}") for value in (0.0, 0.5, 1.0)]
    for place, _ in marks:
        painter.line([(left, top + place), (right, top + place)], fill=(225, 225, 225))
    if len(values) > 1:
        painter.line(points(values), fill=_PALE, width=1)
        width = max(1, len(values) // 20)
        sums = np.cumsum(np.concatenate([np.zeros(1), values]))
        start = np.maximum(np.arange(1, len(values) + 1) - width, 0)
        ends = np.arange(1, len(values) + 1)
        painter.line(points((sums[ends] - sums[start]) / (ends - start)), fill=_DARK, width=3)
    painter.rectangle((left, top, right, bottom), outline=drawing.INK)
    drawing.ticks_beside(image, _BOX, marks, "left")
    drawing.ticks_below(
        image, _BOX, [(n * across, f"{n + 1}") for n in (0, (steps - 1) // 2, steps - 1)]
    )
    drawing.write(image, "step", ((left + right) // 2, bottom + 50), align="centre")
    return image


def side_by_side(panels: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Returns labelled pictures in one (1, H, W, 3), as ComfyUI's IMAGE.

    Args:
        panels: labels, and pictures (1, h, w, 3) of one size.
    """
    pictures = [one_picture(picture) for _, picture in panels]
    widest = max(drawing.text_width(label) for label, _ in panels) + 24
    times = -(-widest // min(pixels.shape[2] for pixels in pictures))
    parts = []
    for (label, _), pixels in zip(panels, pictures, strict=True):
        if times > 1:  # Small pictures are enlarged, so that the labels fit.
            pixels = functional.interpolate(pixels.movedim(-1, 1), scale_factor=times)
            pixels = pixels.movedim(1, -1)
        head = Image.new("RGB", (pixels.shape[2], _LABEL), (255, 255, 255))
        drawing.write(head, label, (12, 6))
        parts.append(torch.cat([as_tensor(head), pixels[..., :3]], dim=1))
    return torch.cat(parts, dim=2)


def one_picture(decoded: Tensor) -> Tensor:
    """Returns the first picture (1, h, w, channels) of what a VAE decoded; of a video (B, N, h, w,
    channels) the frame in its middle, because the first one may have been given."""
    if decoded.dim() == 5:
        decoded = decoded[:, decoded.shape[1] // 2]
    return decoded[:1].float().cpu()


def as_tensor(image: Image.Image) -> Tensor:
    """Returns a picture as ComfyUI's IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
