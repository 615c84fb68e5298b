"""Axes for the X/Y/Z plot: the settings of the accordion's slots. Cells that fail show why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from modules import script_callbacks, scripts
from modules.processing import Processed

from a1111_dmp import host
from a1111_dmp.choice import AXES, FIELDS, SLOTS, TEXTS, axis_name, setting
from a1111_dmp.failure import message_picture
from a1111_dmp.files import NONE
from dmp_common import PatchError
from dmp_common.tools import written

_SIDES = (("x", "width"), ("y", "height"))  # hires fix makes larger pictures than was asked for


def of(p: Any) -> dict[tuple[int, str], Any]:
    """Returns the fields that the axes of a plot have set for a generation, by slot and name."""
    found: dict[tuple[int, str], Any] = getattr(p, "dmp_axes", {})
    return found


def _apply(place: tuple[int, str], p: Any, value: Any, values: Sequence[Any]) -> None:
    # The plot's copies of `p` share the old dictionary, so it must not be changed.
    p.dmp_axes = {**of(p), place: value}


def _confirm_patches(p: Any, values: Sequence[str]) -> None:
    """Checks all patches of an axis, so that a wrong name fails before the plot begins."""
    for value in values:
        if value and value != NONE:
            try:
                host.folder().find(value)
            except PatchError as error:
                raise PatchError(f"DMP: {error}") from error


def _confirm(field: str, p: Any, values: Sequence[Any]) -> None:
    for value in values:
        try:
            setting(field, value)
            if field == "keyframes":
                written.keyframes(value)
        except PatchError as error:
            raise PatchError(f"DMP: {error}") from error
        if field in ("start", "end") and not 0.0 <= value <= 1.0:
            raise PatchError(f"DMP: expected {field} from 0 to 1, found {value}: correct it.")


def _axis(plot: Any, slot: int, field: str) -> Any:
    """Makes the plot's axis for one setting of one slot."""
    kind = str if field == "patch" or field in TEXTS else float
    patch = field == "patch"
    return plot.AxisOption(
        axis_name(slot, field),
        kind,
        partial(_apply, (slot, field)),
        confirm=_confirm_patches if patch else partial(_confirm, field),
        choices=(lambda: [NONE, *host.folder().names()]) if patch else None,
    )


class Shown:
    """Makes the pictures of a plot's cell; a cell that fails by our error shows the message.

    The plot itself writes such errors on the console alone and leaves the cell black.

    Args:
        inner: the host's `process_images`.
    """

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self._inner = inner

    def __call__(self, p: Any) -> Any:
        try:
            return self._inner(p)
        except PatchError as error:
            text = str(error)
            host.tell(p, text)
            size = tuple(
                getattr(p, f"hr_upscale_to_{x}", 0) or getattr(p, side) for x, side in _SIDES
            )
            return Processed(p, [message_picture(text, size)], p.seed, text)


def add() -> None:
    """Adds our axes to the plot, unless they are there already.

    The plot is a script itself, and scripts are loaded in any order, so it may not exist yet.
    """
    plot = next(
        (data.module for data in scripts.scripts_data if data.module.__name__ == "xyz_grid.py"),
        None,
    )
    if plot is None or any(option.label.startswith(AXES) for option in plot.axis_options):
        return
    plot.axis_options.extend(_axis(plot, slot, field) for slot in range(SLOTS) for field in FIELDS)
    plot.process_images = Shown(plot.process_images)


def register() -> None:
    """Asks the host to call `add` when all scripts are loaded."""
    script_callbacks.on_before_ui(add)
