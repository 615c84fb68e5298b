"""Images that turn out to be broken while they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from dmp_common import PatchError
from training.data.batch import Batch
from training.data.skips import Skips, require_few
from training.data.summary import Skipped

_NAMED = 3
_ENOUGH = 64  # images, after which most of them must be usable


class Faults:
    """Counts broken images that were found after the start, each once, and lists them.

    They stay in their batches as grey images with weight 0, so that the other images of a batch
    are the same, whichever process finds them.

    Args:
        skips: what was left out before, and how many broken images there may be.
    """

    def __init__(self, skips: Skips) -> None:
        self._skips = skips
        self._found: dict[str, str] = {}
        self._loaded = self._lost = 0  # images, each as often as it was loaded

    def add(self, broken: dict[str, str]) -> None:
        """Counts broken images: what is wrong with them, by key.

        Raises:
            PatchError: there are more than the options allow.
        """
        new = {key: error for key, error in broken.items() if key not in self._found}
        known = self._skips.broken + len(self._found)
        require_few(known, [PatchError(error) for error in new.values()], self._skips.limit)
        self._found |= new
        for error in new.values():
            print(f"skipped: {error}", file=sys.stderr)

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches.

        Raises:
            PatchError: as `add`.
        """
        for batch in batches:
            self._loaded += len(batch)
            if batch.broken:
                self._lost += len(batch.broken)
                self.add(batch.broken)
                self._require_most(batch.broken)
            yield batch

    def _require_most(self, broken: dict[str, str]) -> None:
        """A run whose disk is gone would go on for ever, and learn nothing."""
        if self._loaded >= _ENOUGH and self._lost * 2 > self._loaded:
            raise PatchError(
                f"expected images that can be used, found {self._lost:,} of {self._loaded:,} that "
                f"cannot, the last because of this: {next(iter(broken.values()))}"
            )

    def summary(self) -> list[Skipped]:
        """What was found so far, as a line of the summary."""
        if not self._found:
            return []
        count, some = len(self._found), ", ".join(list(self._found)[:_NAMED])
        more = ", ..." if count > _NAMED else ""
        text = f"{count:,} images that could not be used when they were loaded ({some}{more})"
        return [Skipped(count, text)]
