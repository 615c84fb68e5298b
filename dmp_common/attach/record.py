"""What a host keeps of a patch that a user has chosen: the loaded file and the settings."""

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
    """A patch that was loaded from a file.

    A deep copy is the same object, because hosts deep-copy the options of a model again and again.

    Args:
        patch: the patch, on the CPU; it is set to evaluation mode.
        path: its file.
    """

    def __init__(self, patch: Patch, path: Path) -> None:
        self.patch = patch.eval().requires_grad_(False)
        self.runtime = runtime_of(self.patch)
        self.path = path

    @property
    def name(self) -> str:
        """The name of the file, for error messages."""
        return self.path.name

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedPatch:
        return self


@dataclass(frozen=True)
class PatchRecord:
    """A loaded patch with its settings. It is immutable; `dataclasses.replace` makes changed ones.

    Args:
        loaded: the patch.
        strength: multiplies the added field; 0 is exactly the base.
        start, end: the patch acts between these points of progress; 0 is noise, 1 the picture.
        curve: factors of the strength at progress 0, 0.5 and 1, and linear in between.
        temperature: divides the gate's logits.
        sites: names of the sites that act; None for all sites of the patch.

    Raises:
        PatchError: a value is out of range.
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
        """Converts to the core's settings, by the host's own rule from progress to a timestep."""
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
