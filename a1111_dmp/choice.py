"""What a user chose: from controls, a prompt, an axis or an infotext, and back into an infotext."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from a1111_dmp.files import NONE, Folder, Known
from dmp_common import PatchError
from dmp_common.attach.record import PatchRecord

SLOTS = 3  # patches that can be stacked in one set of controls
_EMPTY = (None, "", NONE, "none")


@dataclass(frozen=True)
class Choice:
    """A patch by name, and how it is to be used; the names and defaults of the ComfyUI nodes.

    Args:
        patch: its name in the folder; `NONE` for no patch.
        strength: multiplies what the patch adds; 0 is exactly the plain model.
        start, end: progress between which it acts, 0 at the noise and 1 at the picture.
        early, middle, late: what the strength is multiplied by at progress 0, 0.5 and 1.
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
        """From the values of the controls of a slot, or of a request, in the order of the fields.

        Raises:
            PatchError: a value that is not what its control gives.
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
        """The patch, loaded, and how it is to be used.

        Raises:
            PatchError: no such patch, a damaged file, or values out of range.
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
    """A number of a control, a prompt or a request.

    Raises:
        PatchError: something else, or not finite.
    """
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        result = math.nan
    if isinstance(value, bool) or not math.isfinite(result):
        raise PatchError(f"expected a number for {name}, found {value!r}: correct it.")
    return result


def from_controls(values: Sequence[Any], axes: Mapping[str, Any] | None = None) -> list[Choice]:
    """The slots of a set of controls, in order.

    Args:
        values: the fields of each slot, as in `DEFAULTS`.
        axes: fields of the first slot that an X/Y/Z plot sets.

    Raises:
        PatchError: values of a wrong kind, or an axis without a patch to act on.
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
    """The switch of the accordion.

    Raises:
        PatchError: a request with something else in its place.
    """
    if not isinstance(enabled, bool):
        raise PatchError(
            f"expected true or false to enable DMP, found {enabled!r}: give it before the patch."
        )
    return enabled


def from_prompt(positional: Sequence[str], named: Mapping[str, str]) -> Choice:
    """A patch in a prompt: `<dmp:name>`, `<dmp:name:0.8>`, `<dmp:name:0.8:start=0.2:end=0.7>`.

    Raises:
        PatchError: anything else.
    """
    written = ":".join([*positional, *(f"{k}={v}" for k, v in named.items())])
    unknown = sorted(set(named) - set(NUMBERS))
    if unknown or not 1 <= len(positional) <= 2 or (len(positional) == 2 and "strength" in named):
        raise PatchError(
            f"expected <dmp:name:strength>, and after it {', '.join(f'{n}=' for n in NUMBERS)} as "
            f"you like, found <dmp:{written}>: correct the prompt."
        )
    values = {name: number(name, value) for name, value in named.items()}
    if len(positional) == 2:
        values["strength"] = number("strength", positional[1])
    return Choice(positional[0].strip(), **values)


def omitted(values: Sequence[Any], given: int, expected: int) -> list[Any]:
    """The values of a request that left some of its last ones out.

    The host cuts its list of all values by as many, so that the ones it hands over are of the next
    script there.

    Args:
        values: what the host hands over.
        given, expected: how many values its list has, and should have.

    Raises:
        PatchError: more values than there are.
    """
    missing = expected - given
    if missing < 0:
        raise PatchError(
            f"expected at most {len(DEFAULTS)} values for DMP, found {len(DEFAULTS) - missing}: "
            "leave the last ones out."
        )
    kept = len(DEFAULTS) - missing
    return [*values[:kept], *DEFAULTS[max(kept, 0) :]]


# Infotext: "DMP patch", "DMP hash", "DMP strength", and the rest where it differs from the default;
# of the second and third slot "DMP patch 2" and so on.


def label(prefix: str, field: str, slot: int) -> str:
    """The key of a field in an infotext.

    >>> label("DMP", "patch", 0), label("DMP script", "start", 2)
    ('DMP patch', 'DMP script start 3')
    """
    return f"{prefix} {field}" + (f" {slot + 1}" if slot else "")


def to_infotext(prefix: str, slot: int, choice: Choice, known: Known) -> dict[str, Any]:
    """What an infotext says about a slot."""
    plain = Choice()
    texts: dict[str, Any] = {"patch": known.name, "hash": known.hash, "strength": choice.strength}
    for name in NUMBERS:
        if getattr(choice, name) != getattr(plain, name):
            texts[name] = getattr(choice, name)
    return {label(prefix, name, slot): text for name, text in texts.items()}


def from_infotext(
    texts: Mapping[str, Any], prefix: str, slot: int, field: str, folder: Folder
) -> Any:
    """The value of a field that an infotext tells of, or its default where it tells nothing."""
    text = texts.get(label(prefix, field, slot))
    if text is None:
        return getattr(Choice(), field)
    if field != "patch":
        return number(field, text)
    return folder.by_hash(str(text), texts.get(label(prefix, "hash", slot)))
