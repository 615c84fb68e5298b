"""Changes of colour, drawn for each image and epoch."""

from __future__ import annotations

from PIL import Image

from training.data import draws

_HUE = 0.04  # of a full turn, to either side: kohya's 8 of 180 degrees, about
_GAMMA = (0.95, 1.05)


def vary_color(image: Image.Image, *draw: object) -> Image.Image:
    """An RGB image with hue and gamma a little off; Pillow's 8-bit hue, as kohya's OpenCV has."""
    hue = (draws.uniform(*draw, "hue") * 2 - 1) * _HUE
    gamma = _GAMMA[0] + draws.uniform(*draw, "gamma") * (_GAMMA[1] - _GAMMA[0])
    turn = round(hue * 256)
    hues, *others = image.convert("HSV").split()
    turned = hues.point([(value + turn) % 256 for value in range(256)])
    colored = Image.merge("HSV", (turned, *others)).convert("RGB")
    return colored.point([round(255 * (value / 255) ** gamma) for value in range(256)] * 3)
