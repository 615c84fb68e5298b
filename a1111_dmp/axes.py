"""Axes for the X/Y/Z plot: patch, strength, start and end of the accordion's first slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modules import script_callbacks, scripts

from a1111_dmp import host
from a1111_dmp.choice import Choice
from a1111_dmp.files import NONE
from dmp_common import PatchError

_PREFIX = "[DMP] "
_NUMBERS = {"Strength": "strength", "Start": "start", "End": "end"}


def of(p: Any) -> dict[str, Any]:
    """Returns the fields that the axes of a plot have set for a generation."""
    found: dict[str, Any] = getattr(p, "dmp_axes", {})
    return found


def _setter(field: str) -> Callable[[Any, Any, Sequence[Any]], None]:
    def apply(p: Any, value: Any, values: Sequence[Any]) -> None:
        # The plot's copies of `p` share the old dictionary, so it must not be changed.
        p.dmp_axes = {**of(p), field: value}

    return apply


def _confirm_patches(p: Any, values: Sequence[str]) -> None:
    """Checks all patches of an axis, so that a wrong name fails before the plot begins."""
    for value in values:
        if value and value != NONE:
            try:
                host.folder().find(value)
            except PatchError as error:
                raise PatchError(f"DMP: {error}") from error


def _confirm(field: str) -> Callable[[Any, Sequence[float]], None]:
    def confirm(p: Any, values: Sequence[float]) -> None:
        for value in values:
            if field != "strength" and not 0.0 <= value <= 1.0:
                raise PatchError(f"DMP: expected {field} from 0 to 1, found {value}: correct it.")

    return confirm


def add() -> None:
    """Adds our axes to the plot, unless they are there already.

    The plot is a script itself, and scripts are loaded in any order, so it may not exist yet.
    """
    plot = next(
        (data.module for data in scripts.scripts_data if data.module.__name__ == "xyz_grid.py"),
        None,
    )
    if plot is None or any(option.label.startswith(_PREFIX) for option in plot.axis_options):
        return
    plot.axis_options.append(
        plot.AxisOption(
            _PREFIX + "Patch",
            str,
            _setter("patch"),
            confirm=_confirm_patches,
            choices=lambda: [NONE, *host.folder().names()],
        )
    )
    plot.axis_options.extend(
        plot.AxisOption(_PREFIX + name, float, _setter(field), confirm=_confirm(field))
        for name, field in _NUMBERS.items()
    )
    assert set(_NUMBERS.values()) <= set(vars(Choice()))


def register() -> None:
    """Asks the host to call `add` when all scripts are loaded."""
    script_callbacks.on_before_ui(add)
