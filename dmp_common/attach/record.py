"""What hosts keep of a patch that a user chose: where it comes from and how it is to be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmp_common.attach.runtime import runtime_of
from dmp_common.attach.settings import Settings
from dmp_common.bases.schedule import Schedule
from dmp_common.errors import PatchError
from dmp_common.patch.patch import Patch


class LoadedPatch:
    """A patch from a file. Hosts copy what hangs on a model again and again; this is never copied.

    Args:
        patch: in evaluation mode, on the CPU.
        path: of its file.
    """

    def __init__(self, patch: Patch, path: Path) -> None:
        self.patch = patch.eval().requires_grad_(False)
        self.runtime = runtime_of(self.patch)
        self.path = path

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedPatch:
        return self


@dataclass(frozen=True)
class PatchRecord:
    """A loaded patch and how it is to be used. Immutable; `dataclasses.replace` makes others.

    Args:
        loaded: the patch.
        strength: multiplies the added field; 0 is exactly the base.
        start, end: progress between which the patch acts, 0 at the noise and 1 at the picture.
        curve: what the strength is multiplied by at progress 0, 0.5 and 1, linear in between.
        temperature: of the gate.
        sites: names of the sites that act, None for all of the patch's.

    Raises:
        PatchError: a value out of range.
    """

    loaded: LoadedPatch
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    curve: tuple[float, float, float] = (1.0, 1.0, 1.0)
    temperature: float = 1.0
    sites: frozenset[str] | None = None

    def __post_init__(self) -> None:
        try:
            self.settings(lambda percent: (1.0 - percent) * 1000.0)
        except PatchError as error:
            raise PatchError(f"{self.loaded.name}: {error}") from error

    def settings(self, to_timestep: Callable[[float], float]) -> Settings:
        """The core's settings, with the host's own rule from progress to a timestep."""
        early, middle, late = self.curve
        points = [(0.0, early), (0.5, middle), (1.0, late)]
        schedule = Schedule.from_percent(
            self.start,
            self.end,
            [] if self.curve == (1.0, 1.0, 1.0) else points,
            to_timestep,
        )
        return Settings(self.strength, schedule, self.temperature, self.sites)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchRecord:
        return self
