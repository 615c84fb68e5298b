"""A user's choice of patch and settings, read from controls, prompts and axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

from a1111_dmp.files import NONE, Folder, Known
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord
from dmp_common.tools import written

AXES = "[DMP] "  # begins the names of our axes of the X/Y/Z plot
SLOTS = 3  # How many patches one set of controls can combine.
_EMPTY = (None, "", NONE, "none")
EXAMPLES = {"keyframes": "0: 1, 0.5: 0.3, 1: 0", "site_strengths": "in.1-3: 0.5, mid: 1, out.*: 0"}
_NAMED = re.compile(r":\s*(?=[A-Za-z_]+\s*=)")  # before "start=0.2" in a prompt


@dataclass(frozen=True)
class Choice:
    """The name of a patch, and its settings with the names and defaults of the ComfyUI nodes.

    Args:
        patch: the name of the patch in the folder; `NONE` for no patch.
        strength: multiplies what the patch adds; 0 is exactly the plain model.
        start, end: the patch acts between these points of progress; 0 is noise, 1 the picture.
        early, middle, late: factors of the strength at progress 0, 0.5 and 1.
        keyframes: a curve as text, in place of these three, see `written.keyframes`.
        site_strengths: factors at single sites as text, see `written.site_strengths`.
    """

    patch: str = NONE
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    early: float = 1.0
    middle: float = 1.0
    late: float = 1.0
    keyframes: str = ""
    site_strengths: str = ""

    @classmethod
    def of(cls, values: Sequence[Any]) -> Choice:
        """Makes a choice from the values of a slot's controls, or of an API request.

        Args:
            values: one value for each field, in the order of the fields.

        Raises:
            PatchError: a value has the wrong type or is not a finite number.
        """
        patch, *settings = values
        if patch in _EMPTY:
            patch = NONE
        if not isinstance(patch, str):
            raise PatchError(f"expected the name of a patch, found {patch!r}: give it as text.")
        named = zip(FIELDS[1:], settings, strict=True)
        return cls(patch, *(setting(name, value) for name, value in named))

    @classmethod
    def named(cls, values: Mapping[str, Any]) -> Choice:
        """Makes a choice from an object of an API request, {"patch": "ink", "strength": 0.8}.

        Raises:
            PatchError: as `of`, or a name is not one of the fields.
        """
        if unknown := sorted(set(values) - set(FIELDS)):
            raise PatchError(
                f"expected any of {', '.join(FIELDS)} for a patch, found {', '.join(unknown)}: "
                "correct the request."
            )
        return cls.of([values.get(name, getattr(cls, name)) for name in FIELDS])

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
        try:
            keyframes = written.keyframes(self.keyframes)
            site_strengths = written.site_strengths(known.loaded.patch, self.site_strengths)
        except PatchError as error:
            raise PatchError(f"{known.loaded.name}: {error}") from error
        return PatchRecord(
            known.loaded,
            strength=self.strength,
            start=self.start,
            end=self.end,
            curve=(self.early, self.middle, self.late),
            keyframes=keyframes,
            site_strengths=site_strengths,
        ), known


FIELDS = tuple(field.name for field in fields(Choice))
TEXTS = ("keyframes", "site_strengths")
_FIRST = tuple(name for name in FIELDS if name not in TEXTS)
# Scripts get their values by position, and requests give the first ones alone. So the values of all
# slots that were there in the first version come first, and then the texts of all slots.
ORDER = tuple((slot, name) for part in (_FIRST, TEXTS) for slot in range(SLOTS) for name in part)
DEFAULTS = tuple(getattr(Choice(), name) for _, name in ORDER)


def setting(name: str, value: object) -> float | str:
    """Reads the value of a setting that came from a control, a prompt or a request.

    Raises:
        PatchError: the value has the wrong type, or it is not a finite number.
    """
    if name not in TEXTS:
        return number(name, value)
    if not isinstance(value, str | None):
        raise PatchError(
            f"expected a text such as {EXAMPLES[name]} for {name}, found {value!r}: correct it."
        )
    return (value or "").strip()


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


def from_controls(
    values: Sequence[Any], axes: Mapping[tuple[int, str], Any] | None = None
) -> list[Choice]:
    """Makes the choices of all slots of a set of controls, in order.

    Args:
        values: the fields of the slots, in the order of `ORDER`; or an object for each patch, as
            a request may give it, and the defaults after it.
        axes: the fields that an X/Y/Z plot has set, by slot and name.

    Raises:
        PatchError: a value has the wrong type, or an axis has no patch to act on.
    """
    slots = _from_objects(values) or [Choice.of(own) for own in by_slot(values)]
    for (slot, name), value in (axes or {}).items():
        slots[slot] = replace(slots[slot], **{name: value})
    for slot, name in axes or {}:
        if slots[slot].empty and (slot, "patch") not in (axes or {}):
            raise PatchError(
                f"expected a patch for the axis {axis_name(slot, name)}, found none: enable DMP "
                f"and choose Patch {slot + 1}, or make {axis_name(slot, 'patch')} another axis."
            )
    return slots


def axis_name(slot: int, name: str) -> str:
    """Returns the name of the axis of an X/Y/Z plot that sets a field of a slot.

    >>> axis_name(0, "strength"), axis_name(2, "site_strengths")
    ('[DMP] Strength', '[DMP] Site strengths 3')
    """
    return f"{AXES}{name.capitalize().replace('_', ' ')}" + (f" {slot + 1}" if slot else "")


def by_slot(values: Sequence[Any]) -> list[list[Any]]:
    """Sorts values in the order of `ORDER` into a list for each slot, in the order of `FIELDS`."""
    known = dict(zip(ORDER, values, strict=True))
    return [[known[slot, name] for name in FIELDS] for slot in range(SLOTS)]


def _from_objects(values: Sequence[Any]) -> list[Choice]:
    """Makes the choices of a request that gives objects; an empty list for other values."""
    given = list(takewhile(lambda value: isinstance(value, Mapping), values))
    if not given:
        return []
    if len(given) > SLOTS or tuple(values[len(given) :]) != DEFAULTS[len(given) :]:
        raise PatchError(
            f"expected one to {SLOTS} objects for DMP and nothing after them, found "
            f"{len(given)} and other values: give all settings of a patch in its object."
        )
    empty = [Choice()] * (SLOTS - len(given))
    return [Choice.named(value) for value in given] + empty


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


def from_prompt(items: Sequence[str]) -> Choice:
    """Makes a choice from what stands between the colons of `<dmp:...>` in a prompt.

    Users write `<dmp:name>`, `<dmp:name:0.8>` or `<dmp:name:0.8:start=0.2:end=0.7>`. Texts keep the
    colons of their own: `<dmp:name:keyframes=0: 1, 1: 0>`.

    Raises:
        PatchError: the arguments are not of this form.
    """
    whole = ":".join(items)
    first, *rest = _NAMED.split(whole)
    name, *strengths = (part.strip() for part in first.split(":"))
    named = {key.strip(): value for key, _, value in (part.partition("=") for part in rest)}
    given = ["strength"] * len(strengths) + [*named]
    unknown = set(given) - set(FIELDS[1:])
    if not name or unknown or len(set(given)) < len(strengths) + len(rest):
        raise PatchError(
            "expected <dmp:name:strength>, with any of "
            f"{', '.join(f'{n}=' for n in FIELDS[1:])} once after it, found <dmp:{whole}>: correct "
            "the prompt."
        )
    values = {**dict(zip(given, strengths, strict=False)), **named}
    return Choice.named({"patch": name, **values})


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
