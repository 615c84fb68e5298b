"""Draws an error message as a picture, for a place where a picture should be."""

from __future__ import annotations

import textwrap

from PIL import Image

from dmp_common.tools import drawing

_PAPER = (255, 255, 255)


def message_picture(text: str, size: tuple[int, int]) -> Image.Image:
    """Writes a text into a picture; what does not fit is left out.

    Args:
        text: the message.
        size: width and height of the picture in pixels.
    """
    width, height = size
    image = Image.new("RGB", size, _PAPER)
    letter = max(width // 28, 12)  # height of a line
    margin = letter // 2
    advance = drawing.text_width("n" * 20, letter) / 20
    lines = textwrap.wrap(text, max(int((width - 2 * margin) / advance), 1))
    for row, line in enumerate(lines[: height // int(1.3 * letter)]):
        drawing.write(image, line, (margin, margin + row * int(1.3 * letter)), letter)
    return image
