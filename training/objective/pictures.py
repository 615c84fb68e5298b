"""Pictures of what a model made, alone or beside those of its base."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_SMALL = 256  # a picture with a shorter side is enlarged, by a whole factor, up to this
_FACTORS = (64, 32, 16, 8, 4, 2, 1)  # of a difference
_FRAMES = 5  # of a video, at most
_GAP = 8  # pixels around each panel
_TEXT = 16  # pixels, height of the letters
_LINE = 22  # pixels from one line of text to the next
_LINES = 6  # of a prompt; the rest is cut off
_INK, _PAPER = (0, 0, 0), (255, 255, 255)


def as_image(picture: Tensor) -> Image.Image:
    """A picture (C, H, W) in [-1, 1], grey or in colour; small ones are enlarged."""
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    factor = max(1, _SMALL // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def strip(video: Tensor) -> Tensor:
    """Some frames of a video (C, N, H, W) from its first to its last, one below the other, as one
    picture; a picture (C, H, W) as it is."""
    if video.ndim == 3:
        return video
    count = min(_FRAMES, video.shape[1])
    chosen = torch.linspace(0, video.shape[1] - 1, count).round().long()
    return torch.cat(list(video[:, chosen].unbind(1)), dim=-2)


def comparison(base: Tensor, patched: Tensor, prompt: str, name: str = "patched") -> Image.Image:
    """Two pictures from equal noise and their difference, labelled, with the prompt below.

    The difference is patched minus base, amplified, around mid-grey: brighter where the patched
    picture is brighter. The label gives the factor.

    Args:
        base, patched: (C, H, W) in [-1, 1], of one shape.
        prompt: caption or class; it is wrapped, and cut off after six lines.
        name: label of the second picture, for a LoRA or another method.

    Raises:
        ValueError: the pictures have different shapes.
    """
    if base.shape != patched.shape:
        raise ValueError(
            f"expected two pictures of one shape, found {tuple(base.shape)} and "
            f"{tuple(patched.shape)}"
        )
    difference, label = _amplified(patched.clamp(-1, 1) - base.clamp(-1, 1))
    panels = {"base": base, name: patched, label: difference}
    images = [as_image(picture) for picture in panels.values()]
    font = ImageFont.load_default(_TEXT)
    width, height = images[0].size
    whole = 3 * (width + _GAP) + _GAP
    lines = _wrapped(prompt, font, whole - 2 * _GAP)
    canvas = Image.new("RGB", (whole, _LINE + _GAP + height + _LINE * len(lines) + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (title, image) in enumerate(zip(panels, images, strict=True)):
        left = _GAP + number * (width + _GAP)
        draw.text((left, _GAP // 2), title, fill=_INK, font=font)
        canvas.paste(image, (left, _LINE + _GAP // 2))
    for number, line in enumerate(lines):
        top = _LINE + height + _GAP + number * _LINE
        draw.text((_GAP, top), line, fill=_INK, font=font)
    return canvas


def _amplified(difference: Tensor) -> tuple[Tensor, str]:
    """A difference (C, H, W) times the largest factor that fits, and its label.

    One value in a hundred may be cut off, or a single bright pixel would hide all others.
    """
    if not bool(difference.any()):
        return difference, "no difference"
    values = difference.abs().flatten().sort().values
    large = float(values[int(0.99 * (len(values) - 1))])
    factor = next((f for f in _FACTORS if f * large <= 1), _FACTORS[-1])
    return difference * factor, f"difference x{factor}"


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines of at most `width` pixels; a word that is longer than a line is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-3]}..."]
    return lines if lines[0] else []
