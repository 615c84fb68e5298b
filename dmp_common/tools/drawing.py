"""Draws the parts of a figure with numpy and Pillow alone: colours, ticks, panels and text.

Every host has these two libraries; a plotting library may be missing there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Values = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside

INK, GREY = (20, 20, 20), (110, 110, 110)
TITLE, TEXT = 38, 27

# Nine colours of the map "viridis", in which equal steps look equal. Others are interpolated.
_COLOURS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
_ANCHORS = np.array([tuple(bytes.fromhex(code)) for code in _COLOURS.split()], dtype=np.float32)
# The height of all panels, and the widths of the panel of weights and of the colour bar.
HEIGHT, WIDTH, _BAR = 256, 460, 28
LEFT, _TOP, GAP = 128, 136, 20
_ABOVE, _BELOW = 66, 62  # Space for headings above and for ticks below the panels of a row.
_TICK = 8


@dataclass(frozen=True)
class Layout:
    """The positions of all panels of a picture, in pixels.

    Args:
        rows: the number of rows, one for each site.
        columns: for each map the index of its timestep in T.
        map_size: the width and height of a map.
    """

    rows: int
    columns: tuple[int, ...]
    map_size: tuple[int, int]

    @classmethod
    def of(cls, grid: tuple[int, int] | None, rows: int, steps: int, maps: int = 5) -> Layout:
        """Makes the layout for a grid of prompts. Without a grid there are no maps."""
        if grid is None:
            return cls(rows, (), (0, 0))
        columns = np.linspace(0, steps - 1, max(min(maps, steps), 0)).round().astype(int)
        cell = HEIGHT / max(grid)
        cell = float(int(cell)) if cell >= 1 else cell
        height, width = (max(int(side * cell), 1) for side in grid)
        return cls(rows, tuple(columns.tolist()), (width, height))

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the picture."""
        return self.bar(0)[2] + 150, _TOP + self.rows * self._pitch + 40

    def weights(self, row: int) -> Box:
        """Returns the box of the panel of weights by timestep and prompt."""
        top = _TOP + row * self._pitch + _ABOVE
        return LEFT, top, LEFT + WIDTH, top + HEIGHT

    def map(self, row: int, index: int) -> Box:
        """Returns the box of the map of one timestep, which is centred in a square."""
        _, top, right, _ = self.weights(row)
        width, height = self.map_size
        left = right + 2 * GAP + index * (HEIGHT + GAP) + (HEIGHT - width) // 2
        top += (HEIGHT - height) // 2
        return left, top, left + width, top + height

    def bar(self, row: int) -> Box:
        """Returns the box of the colour bar."""
        _, top, right, bottom = self.weights(row)
        left = right + 2 * GAP + len(self.columns) * (HEIGHT + GAP)
        return left, top, left + _BAR, bottom

    @property
    def _pitch(self) -> int:
        return _ABOVE + HEIGHT + _BELOW


@dataclass(frozen=True)
class ColourScale:
    """Maps values to colours from dark (`low`) to bright (`high`); one colour if both are equal.

    Args:
        low, high: the ends; values outside of them have the colour of the nearer end.
        log: whether the scale is logarithmic.
        clipped: whether there are values below `low`.
    """

    low: float
    high: float
    log: bool = False
    clipped: bool = False

    def place(self, values: Values) -> Values:
        """Returns the positions of values on the scale, from 0 to 1."""
        if not self.high > self.low:
            return np.full_like(values, 0.5)
        values = np.clip(values, self.low, self.high)
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        share: Values = (values - np.float32(low)) / np.float32(high - low)
        return share

    def colours(self, values: Values) -> npt.NDArray[np.uint8]:
        """Returns the colours (H, W, 3) of values (H, W)."""
        place = self.place(values) * (len(_ANCHORS) - 1)
        anchors = np.arange(len(_ANCHORS))
        channels = [np.interp(place, anchors, _ANCHORS[:, channel]) for channel in range(3)]
        rounded: npt.NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
        return rounded

    def ticks(self) -> list[tuple[float, str]]:
        """Returns round values on the scale, with their texts."""
        if not self.log:
            return ticks(self.low, self.high, 6)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = [factor * 10.0**exponent for exponent in exponents for factor in (1, 3)]
        marks = [step for step in steps if self.low * 0.999 <= step <= self.high]
        below = "< " if self.clipped else ""
        return [(mark, f"{'' if n else below}{mark:g}") for n, mark in enumerate(marks)]


def panel(image: Image.Image, box: Box, values: Values, scale: ColourScale) -> None:
    """Paints values (H, W) into a box, with a frame around it.

    Each value fills a block of pixels. Where there are more values than pixels, they are averaged.
    """
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    sized = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    sized = sized.resize(size, Image.Resampling.BOX)
    image.paste(Image.fromarray(scale.colours(np.asarray(sized))), (left, top))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=INK, width=2)


def colour_bar(image: Image.Image, box: Box, scale: ColourScale, label: str) -> None:
    """Draws the colours of a scale, with the highest on top, its ticks and a label."""
    height = box[3] - box[1]
    place = np.linspace(1, 0, height, dtype=np.float32)[:, None]
    panel(image, box, place, ColourScale(0.0, float(scale.high > scale.low)))
    values, texts = zip(*scale.ticks(), strict=True)
    tops = (1 - scale.place(np.array(values, dtype=np.float32))) * (height - 1)
    ticks_beside(image, box, list(zip(tops.tolist(), texts, strict=True)), "right")
    left = box[2] + 26 + max(text_width(text) for text in texts)
    write(image, label, (left, (box[1] + box[3]) // 2), upwards=True)


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Returns round numbers from low to high with their texts.

    There are at most `most` of them, and usually at least half as many.

    >>> ticks(0.98, 1.03, 6)
    [(0.98, '0.98'), (0.99, '0.99'), (1.0, '1.00'), (1.01, '1.01'), (1.02, '1.02'), (1.03, '1.03')]
    >>> ticks(3.0, 3.0, 6)
    [(3.0, '3')]
    """
    spread = high - low
    if not spread > 0:
        return [(low, f"{low:.6g}")]
    exponent = math.floor(math.log10(spread / most))
    for step in (factor * 10.0**exponent for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        if last - first < most:
            break
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    marks = [round(index * step, decimals) for index in range(first, last + 1)]
    return [(mark, f"{mark:.{decimals}f}") for mark in marks]


def ticks_below(image: Image.Image, box: Box, marks: list[tuple[float, str]]) -> None:
    """Draws ticks below a panel. A mark is a distance from its left edge in pixels, and a text."""
    for offset, text in marks:
        x = box[0] + round(offset)
        ImageDraw.Draw(image).line((x, box[3] + 2, x, box[3] + 2 + _TICK), fill=INK, width=2)
        write(image, text, (x, box[3] + _TICK + 4), align="centre")


def ticks_beside(
    image: Image.Image, box: Box, marks: list[tuple[float, str]], side: Literal["left", "right"]
) -> None:
    """Draws ticks beside a panel. A mark is a distance from its top in pixels, and a text."""
    for offset, text in marks:
        y = box[1] + round(offset)
        x = box[0] - 2 - _TICK if side == "left" else box[2] + 1
        ImageDraw.Draw(image).line((x, y, x + _TICK, y), fill=INK, width=2)
        at = x - 6 if side == "left" else x + _TICK + 8
        write(image, text, (at, y - TEXT // 2 - 2), align="right" if side == "left" else "left")


def write(
    image: Image.Image,
    text: str,
    at: tuple[int, int],
    size: int = TEXT,
    *,
    align: Literal["left", "centre", "right"] = "left",
    ink: tuple[int, int, int] = INK,
    upwards: bool = False,
) -> None:
    """Writes a line of text.

    Args:
        image: the picture, which is changed.
        text: the line; characters that are not printable ASCII become question marks.
        at: x and y in pixels. x is the left end, middle or right end of the line, by `align`, and y
            its top. With `upwards` x is the left edge and y the middle.
        size: the height of the line in pixels.
        align: which point of the line x is.
        ink: the colour.
        upwards: whether the line is turned by 90 degrees and read from bottom to top.
    """
    mask = _text_mask(text, size)
    x, y = at
    if upwards:
        mask = mask.transpose(Image.Transpose.ROTATE_90)
        y -= mask.height // 2
    else:
        x -= {"left": 0, "centre": mask.width // 2, "right": mask.width}[align]
    image.paste(ink, (x, y), mask)


def text_width(text: str, size: int = TEXT) -> int:
    """Returns the width of a line of text in pixels."""
    return _text_mask(text, size).width


def _text_mask(text: str, size: int) -> Image.Image:
    """Draws a line of text in white on black."""
    font, scale = _font(size)
    printable = "".join(c if c.isascii() and c.isprintable() else "?" for c in text) or " "
    width = math.ceil(font.getbbox(printable)[2]) + 1
    mask = Image.new("L", (width, math.ceil(size * 1.25 / scale)))
    ImageDraw.Draw(mask).text((0, 0), printable, fill=255, font=font)
    return mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=8)
def _font(size: int) -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, int]:
    """Returns the font that comes with Pillow, and the factor by which its letters are enlarged."""
    try:
        return ImageFont.load_default(size), 1
    except (TypeError, ImportError, OSError):  # Pillow < 10.1, or built without FreeType
        return ImageFont.load_default(), max(round(size / 12), 1)
