"""A user's choice of patch and settings, read from controls, prompts and axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from a1111_dmp.files import NONE, Folder, Known
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord

SLOTS = 3  # How many patches one set of controls can combine.
_EMPTY = (None, "", NONE, "none")


@dataclass(frozen=True)
class Choice:
    """The name of a patch, and its settings with the names and defaults of the ComfyUI nodes.

    Args:
        patch: the name of the patch in the folder; `NONE` for no patch.
        strength: multiplies what the patch adds; 0 is exactly the plain model.
        start, end: the patch acts between these points of progress; 0 is noise, 1 the picture.
        early, middle, late: factors of the strength at progress 0, 0.5 and 1.
    """

    patch: str = NONE
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    early: float = 1.0
    middle: float = 1.0
    late: float = 1.0

    @classmethod
    def of(cls, values: Sequence[Any]) -> Choice:
        """Makes a choice from the values of a slot's controls, or of an API request.

        Args:
            values: one value for each field, in the order of the fields.

        Raises:
            PatchError: a value has the wrong type or is not a finite number.
        """
        patch, *numbers = values
        if patch in _EMPTY:
            patch = NONE
        if not isinstance(patch, str):
            raise PatchError(f"expected the name of a patch, found {patch!r}: give it as text.")
        return cls(patch, *(number(n, v) for n, v in zip(NUMBERS, numbers, strict=True)))

    @property
    def empty(self) -> bool:
        """Whether no patch is chosen."""
        return self.patch in _EMPTY

    def record(self, folder: Folder) -> tuple[PatchRecord, Known]:
        """Loads the patch.

        Returns:
            The patch with its settings, and the patch with its name in the folder and its hash.

        Raises:
            PatchError: there is no such patch, its file is damaged, or a setting is out of range.
        """
        known = folder.load(self.patch)
        return PatchRecord(
            known.loaded,
            strength=self.strength,
            start=self.start,
            end=self.end,
            curve=(self.early, self.middle, self.late),
        ), known


NUMBERS = tuple(field.name for field in fields(Choice) if field.name != "patch")
FIELDS = tuple(field.name for field in fields(Choice))
DEFAULTS = tuple(getattr(Choice(), name) for name in FIELDS) * SLOTS


def number(name: str, value: object) -> float:
    """Reads a number that came from a control, a prompt or a request.

    Args:
        name: of the setting, for the message.
        value: a number, or a text that stands for one.

    Raises:
        PatchError: the value is not a number, or it is not finite.
    """
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        result = math.nan
    if isinstance(value, bool) or not math.isfinite(result):
        raise PatchError(f"expected a number for {name}, found {value!r}: correct it.")
    return result


def from_controls(values: Sequence[Any], axes: Mapping[str, Any] | None = None) -> list[Choice]:
    """Makes the choices of all slots of a set of controls, in order.

    Args:
        values: the fields of each slot, as in `DEFAULTS`.
        axes: fields of the first slot that an X/Y/Z plot has set.

    Raises:
        PatchError: a value has the wrong type, or an axis has no patch to act on.
    """
    size = len(FIELDS)
    slots = [Choice.of(values[n * size : (n + 1) * size]) for n in range(SLOTS)]
    if axes:
        slots[0] = replace(slots[0], **axes)
        if slots[0].empty and "patch" not in axes:
            raise PatchError(
                f"expected a patch for the axis [DMP] {', '.join(axes)}, found none: enable DMP "
                "and choose Patch 1, or make [DMP] Patch another axis."
            )
    return slots


def is_on(enabled: object) -> bool:
    """Reads the switch of the accordion.

    Raises:
        PatchError: a request gave something other than true or false.
    """
    if not isinstance(enabled, bool):
        raise PatchError(
            f"expected true or false to enable DMP, found {enabled!r}: give it before the patch."
        )
    return enabled


def from_prompt(positional: Sequence[str], named: Mapping[str, str]) -> Choice:
    """Makes a choice from the arguments of `<dmp:...>` in a prompt.

    Users write `<dmp:name>`, `<dmp:name:0.8>` or `<dmp:name:0.8:start=0.2:end=0.7>`.

    Raises:
        PatchError: the arguments are not of this form.
    """
    written = ":".join([*positional, *(f"{k}={v}" for k, v in named.items())])
    unknown = sorted(set(named) - set(NUMBERS))
    if unknown or not 1 <= len(positional) <= 2 or (len(positional) == 2 and "strength" in named):
        raise PatchError(
            "expected <dmp:name:strength>, with any of "
            f"{', '.join(f'{n}=' for n in NUMBERS)} after it, found <dmp:{written}>: correct "
            "the prompt."
        )
    values = {name: number(name, value) for name, value in named.items()}
    if len(positional) == 2:
        values["strength"] = number("strength", positional[1])
    return Choice(positional[0].strip(), **values)


def omitted(values: Sequence[Any], given: int, expected: int) -> list[Any]:
    """Fills in the last values of a request that left them out.

    The host's list of all values is then too short by as many. It cuts our values out of that
    list by position, so the last ones that it passes on belong to the next script.

    Args:
        values: what the host passes on.
        given, expected: how many values the host's list has, and how many it should have.

    Returns:
        One value for each of `DEFAULTS`.

    Raises:
        PatchError: the request gave more values than there are.
    """
    missing = expected - given
    if missing < 0:
        raise PatchError(
            f"expected at most {len(DEFAULTS)} values for DMP, found {len(DEFAULTS) - missing}: "
            "remove the last ones."
        )
    kept = len(DEFAULTS) - missing
    return [*values[:kept], *DEFAULTS[max(kept, 0) :]]
