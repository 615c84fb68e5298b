"""What a host keeps of a patch that a user has chosen: the loaded file and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

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
        keyframes: points (progress, factor) of a curve, in place of `curve`.
        site_strengths: factors of the strength at single sites, by name; other sites have 1.
        mask: where in the picture the patch acts (B or 1, H, W), from 0 to 1; None for everywhere.

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
    keyframes: tuple[tuple[float, float], ...] = ()
    site_strengths: tuple[tuple[str, float], ...] = ()
    mask: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self.settings(lambda percent: (1.0 - percent) * 1000.0)
        except PatchError as error:
            raise PatchError(f"{self.loaded.name}: {error}") from error

    def settings(self, to_timestep: Callable[[float], float]) -> Settings:
        """Converts to the core's settings, by the host's own rule from progress to a timestep."""
        early, middle, late = self.curve
        curved = self.curve != (1.0, 1.0, 1.0)
        if curved and self.keyframes:
            raise PatchError(
                "expected either keyframes or the factors early, middle and late, found both: "
                "leave the keyframes empty, or set the three factors to 1."
            )
        points = [(0.0, early), (0.5, middle), (1.0, late)] if curved else self.keyframes
        schedule = Schedule.from_percent(self.start, self.end, points, to_timestep)
        return Settings(self.strength, schedule, self.temperature, self.sites, self.site_strengths)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchRecord:
        return self
