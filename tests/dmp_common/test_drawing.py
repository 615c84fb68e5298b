"""The means of drawing: colours and ticks."""

import numpy as np
import pytest
from PIL import Image

from dmp_common.tools.drawing import ColourScale


def test_colours_become_steadily_lighter():
    image = Image.fromarray(ColourScale(0.0, 1.0).colours(np.linspace(0, 1, 256)[None]))
    lightness = np.asarray(image.convert("L"))[0].astype(int)
    assert (np.diff(lightness) >= 0).all()
    assert np.diff(lightness).max() <= 3


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 6.1, False, ["0", "2", "4", "6"]),  # seven would be more than six
        (0.9985, 1.0012, False, ["0.9985", "0.9990", "0.9995", "1.0000", "1.0005", "1.0010"]),
        (0.0, 180.0, False, ["0", "50", "100", "150"]),
        (0.1, 41.0, True, ["0.1", "0.3", "1", "3", "10", "30"]),
        (1.0, 1.0, False, ["1"]),
    ],
)
def test_ticks_are_round_and_few(low, high, log, expected):
    ticks = ColourScale(low, high, log).ticks()
    assert [text for _, text in ticks] == expected
