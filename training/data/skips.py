"""What is left out of the data and why, and how many broken images may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from dmp_common import PatchError
from dmp_common.errors import printable_path
from training.data.summary import Skipped

_NAMED = 3  # names in a line of the summary
_LISTED = 25  # lines of an error


class Tolerance(Protocol):
    """The options that say what may be left out."""

    skip_broken: bool
    max_broken: int


class Skips:
    """What a source of data leaves out: names by reason, in the order in which they came.

    Args:
        options: how many broken images may be left out.
    """

    def __init__(self, options: Tolerance) -> None:
        self.limit = None if options.skip_broken else options.max_broken
        self.any_number = options.skip_broken
        self._reasons: dict[str, list[str]] = {}
        self._broken: dict[str, PatchError] = {}

    def add(self, reason: str, names: Iterable[str]) -> None:
        """Counts what is left out for a reason; the reason reads on from a number."""
        names = list(names)
        if names:
            self._reasons.setdefault(reason, []).extend(names)

    def add_broken(self, name: str, error: PatchError) -> None:
        """Counts a broken image."""
        self._broken[name] = error

    @property
    def broken(self) -> int:
        """Broken images so far."""
        return len(self._broken)

    def check(self) -> None:
        """Raises:
        PatchError: there are more broken images than the options allow; all are listed.
        """
        require_few(0, list(self._broken.values()), self.limit)

    def summary(self) -> list[Skipped]:
        """A line for each reason: how many, and the first names."""
        broken = {"broken images": list(self._broken)} if self._broken else {}
        lines = []
        for reason, names in {**broken, **self._reasons}.items():
            some = ", ".join(printable_path(name) for name in names[:_NAMED])
            more = ", ..." if len(names) > _NAMED else ""
            lines.append(Skipped(len(names), f"{len(names):,} {reason} ({some}{more})"))
        return lines


def require_few(known: int, errors: Sequence[PatchError], limit: int | None) -> None:
    """Checks the number of broken images.

    Args:
        known: images that were found broken before.
        errors: of the new ones.
        limit: how many there may be; None for any number.

    Raises:
        PatchError: there are more. It lists the new ones.
    """
    if not errors or limit is None or known + len(errors) <= limit:
        return
    if limit == 0 and len(errors) == 1:
        raise errors[0]
    raise PatchError(
        f"expected at most {limit} images that cannot be used (--max_broken), found "
        f"{known + len(errors)}: repair or remove them, raise --max_broken, or give --skip_broken "
        f"to do without them.\n  {listed(errors)}"
    )


def listed(entries: Sequence[object]) -> str:
    """Entries of an error, a line each; the last line counts those that are not shown."""
    lines = [str(entry) for entry in entries[:_LISTED]]
    if len(entries) > _LISTED:
        lines.append(f"and {len(entries) - _LISTED:,} more")
    return "\n  ".join(lines)
