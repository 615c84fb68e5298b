"""Where the wires of a workflow run, and which nodes hide them.

ComfyUI draws a wire as a cubic curve from an output to an input; its two middle points lie a
quarter of the distance to the right of the output and to the left of the input.
"""

from __future__ import annotations

import math
from typing import Any

TITLE = 30  # pixels of a node's title, above its position
_POINTS = 80
_SLOT = 14  # pixels from a node's edge to the farther side of its slots
_APART = 4  # pixels between a wire and another node

Box = tuple[float, float, float, float]
Point = tuple[float, float]


def boxes_of(flow: dict[str, Any]) -> dict[int, Box]:
    """Left, top, right and bottom of each node, titles included."""
    found = {}
    for node in flow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        found[int(node["id"])] = (x, y - TITLE, x + width, y + height)
    return found


def wires_of(flow: dict[str, Any]) -> list[tuple[int, int, Point, Point]]:
    """The nodes and the points that each wire joins, in nodes on the canvas."""
    boxes = boxes_of(flow)
    found = []
    for _, source, output, target, slot, _ in flow["links"]:
        start = boxes[source][2] - 9, boxes[source][1] + TITLE + 14 + 20 * output
        end = boxes[target][0] + 10, boxes[target][1] + TITLE + 14 + 20 * slot
        found.append((source, target, start, end))
    return found


def behind(boxes: dict[int, Box], wires: list[tuple[int, int, Point, Point]]) -> list[str]:
    """A sentence for every wire that runs behind a node, its own two included."""
    found = []
    for source, target, start, end in wires:
        for number, (left, top, right, bottom) in boxes.items():
            apart = 0 if number in (source, target) else _APART
            left, right = left - apart, right + apart
            if number == source:
                right -= _SLOT
            if number == target:
                left += _SLOT
            for x, y in _curve(start, end):
                if left < x < right and top - apart < y < bottom + apart:
                    found.append(f"{source} -> {target} runs behind {number} at {x:.0f}, {y:.0f}")
                    break
    return found


def _curve(start: Point, end: Point) -> list[Point]:
    reach = 0.25 * math.dist(start, end)
    corners = [start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end]
    points = []
    for n in range(_POINTS + 1):
        t = n / _POINTS
        weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        x, y = (sum(w * c[i] for w, c in zip(weights, corners, strict=True)) for i in (0, 1))
        points.append((x, y))
    return points
