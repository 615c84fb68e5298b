"""Pictures of numbers, for the loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dmp_common.tools import drawing
from dmp_common.tools.drawing import GAP, HEIGHT, LEFT, WIDTH, ColourScale

_TOP = 90


def losses_chart(validation: Mapping[int, Sequence[float]], base: Sequence[float]) -> Image.Image:
    """The change of the validation loss in per cent of the base's, by step and noise level.

    Args:
        validation: losses by range of timesteps (bins,), least noisy first, of each step.
        base: the same of the base.
    """
    steps = sorted(validation)
    table = np.array([validation[step] for step in steps], dtype=np.float64)
    own = np.maximum(np.array(base, dtype=np.float64), np.finfo(np.float64).tiny)
    change = (100 * (table / own - 1)).astype(np.float32).T  # (bins, steps)
    scale = ColourScale(float(change.min()), float(change.max()))
    box = (LEFT, _TOP, LEFT + WIDTH, _TOP + HEIGHT)
    bar = (box[2] + GAP, box[1], box[2] + GAP + 28, box[3])
    image = Image.new("RGB", (bar[2] + 260, box[3] + 110), (255, 255, 255))
    drawing.write(image, "validation loss, change in % of the base's", (LEFT, 22))
    drawing.panel(image, box, change, scale)
    drawing.colour_bar(image, bar, scale, "%")
    height, width = HEIGHT / len(change), WIDTH / len(steps)
    rows = [((row + 0.5) * height, str(1000 * row // len(change))) for row in range(len(change))]
    drawing.ticks_beside(image, box, rows[:: max(1, len(rows) // 5)], "left")
    drawing.write(image, "timestep", (12, (box[1] + box[3]) // 2), upwards=True)
    columns = [((column + 0.5) * width, str(step)) for column, step in enumerate(steps)]
    drawing.ticks_below(image, box, columns[:: max(1, len(columns) // 4)])
    drawing.write(image, "step", ((box[0] + box[2]) // 2, box[3] + 52), align="centre")
    return image
