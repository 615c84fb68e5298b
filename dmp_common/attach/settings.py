"""How an attached patch is used: its strength, its schedule, its sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmp_common.bases.schedule import ALWAYS, EVERYWHERE, LAST, Schedule, inside
from dmp_common.compat import is_compiling
from dmp_common.errors import PatchError

_POINTS = 16  # curves in `Dials` are filled up to a multiple of this number of points


@dataclass(frozen=True)
class Settings:
    """How a patch is used. The settings do not change the patch and are not saved in its file.

    Args:
        strength: multiplies the added field; 0 is exactly the base.
        schedule: where along the timesteps the patch acts, and how strongly.
        temperature: divides the gate's logits; above 1 it makes the weights more equal.
        sites: names of the sites that act; None for all sites of the patch.
        site_strengths: factors of the strength at single sites, by name; other sites have 1.

    Attributes:
        steady: whether the strength is the same at all timesteps.

    Raises:
        PatchError: a strength or the temperature is out of range.
    """

    strength: float = 1.0
    schedule: Schedule = ALWAYS
    temperature: float = 1.0
    sites: frozenset[str] | None = None
    site_strengths: tuple[tuple[str, float], ...] = ()
    steady: bool = field(init=False, repr=False, compare=False, default=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steady", self.schedule.always)
        if isinstance(self.site_strengths, Mapping):
            object.__setattr__(self, "site_strengths", tuple(self.site_strengths.items()))
        named = {f"strength of site {name}": value for name, value in self.site_strengths}
        for name, strength in {"strength": self.strength, **named}.items():
            if not -1e4 < strength < 1e4:
                raise PatchError(f"expected a finite {name}, found {strength}: use about 0 to 2.")
        if not 1e-3 <= self.temperature <= 1e3:
            raise PatchError(
                f"expected a gate temperature from 0.001 to 1000, found {self.temperature}: "
                "use about 0.5 to 2."
            )

    def needs_timesteps(self, within: tuple[int, int] = EVERYWHERE) -> bool:
        """Tells whether the strength differs between timesteps.

        Args:
            within: the timesteps of the patch itself, see `Variant.timesteps`.
        """
        return within != EVERYWHERE or not self.steady

    def strengths(
        self, timesteps: Tensor | None, within: tuple[int, int] = EVERYWHERE
    ) -> float | Tensor:
        """Returns the strength of each batch item, or one number where it is the same for all.

        Args:
            timesteps: (B,) on the scale 0..1000; needed where the strength is not constant.
            within: the timesteps of the patch itself; its strength is 0 elsewhere.

        Raises:
            PatchError: the timesteps are missing, or they are on another scale.
        """
        if self.strength == 0.0 or not self.needs_timesteps(within):
            return self.strength
        timesteps = required(timesteps)
        strengths = self.schedule.factors(timesteps) * self.strength  # (B,)
        if within != EVERYWHERE:
            strengths = torch.where(inside(timesteps, within), strengths, 0.0)
        if is_compiling():  # Reading numbers would split the graph, or make them fixed in it.
            return strengths
        # Read together: each reading makes the processor wait for the GPU.
        values, times = torch.stack([strengths, timesteps.double()]).tolist()
        _require_scale(times)
        return float(values[0]) if len(set(values)) == 1 else strengths

    def active(self, columns: Mapping[str, int]) -> dict[str, int]:
        """Returns the sites that act, by name, of those of a patch.

        Raises:
            PatchError: the settings name other sites than these.
        """
        self.require_sites(tuple(columns))
        off = {name for name, strength in self.site_strengths if strength == 0.0}
        return {
            name: column
            for name, column in columns.items()
            if (self.sites is None or name in self.sites) and name not in off
        }

    def require_sites(self, known: Sequence[str]) -> None:
        """Refuses names that are not sites of a patch.

        Raises:
            PatchError: a name is not among `known`.
        """
        asked = {*(self.sites or ()), *(name for name, _ in self.site_strengths)}
        if unknown := sorted(asked - set(known)):
            raise PatchError(
                f"expected sites of this patch ({', '.join(known)}), found "
                f"{', '.join(unknown)}: choose among the patch's."
            )


class Dials:
    """Settings as tensors, for compiled graphs and for derivatives with respect to the timestep.

    A compiled graph takes tensors as inputs, so that another strength or schedule needs no new
    graph; Python numbers would become constants of it.

    Args:
        settings: the settings, of which the strength, the schedule and the strengths of single
            sites become tensors.
        sites: names of the patch's sites, in order.
        on: whether the patch acts at all.
    """

    def __init__(self, settings: Settings, sites: Sequence[str], on: bool = True) -> None:
        schedule, factors = settings.schedule, dict(settings.site_strengths)
        curve = schedule.curve or ((0.0, 1.0),)
        # Segments without length add nothing: they fill the curve up to a fixed number of points.
        padded = [*curve, *[curve[-1]] * (-len(curve) % _POINTS)]
        with torch.inference_mode(False):
            self.strength = torch.tensor(settings.strength if on else 0.0, dtype=torch.float64)
            self.ends = torch.tensor([schedule.last, schedule.first], dtype=torch.float64)
            self.curve = torch.tensor(padded, dtype=torch.float64)  # (points, 2)
            self.sites = torch.tensor([factors.get(name, 1.0) for name in sites])  # (S,)

    def strengths(self, timesteps: Tensor, within: tuple[int, int]) -> Tensor:
        """Returns the strength of each batch item (B,), float64; see `Settings.strengths`."""
        t = timesteps.double()
        curve, ends = self.curve.to(t.device), self.ends.to(t.device)
        low, high = curve[:-1, 0], curve[1:, 0]  # (points - 1,)
        rise = curve[1:, 1] - curve[:-1, 1]
        sloped = high > low
        place = (t[:, None] - low) / torch.where(sloped, high - low, 1.0)  # (B, points - 1)
        passed = torch.where(sloped, place.clamp(0.0, 1.0), (t[:, None] >= high).double())
        factors = curve[0, 1] + (rise * passed).sum(1)  # (B,)
        acts = (t >= ends[0]) & (t <= ends[1])
        if within != EVERYWHERE:
            acts = acts & inside(t, within)
        return torch.where(acts, factors, 0.0) * self.strength.to(t.device)

    def site_strengths(
        self, settings: Settings, columns: Mapping[str, int]
    ) -> dict[str, float | Tensor]:
        """Returns the factors of the single sites that settings name, by name.

        Args:
            settings: the settings.
            columns: the place of each site among those of the patch.
        """
        return {name: self.sites[columns[name]] for name, _ in settings.site_strengths}


def required(timesteps: Tensor | None) -> Tensor:
    """Returns the timesteps of a call, which must be given if the strength depends on them.

    Raises:
        PatchError: the timesteps are missing.
    """
    if timesteps is None:
        raise PatchError(
            "a schedule, or a patch of a part of the timesteps, needs the timesteps of the "
            "call: pass `timesteps` to prepare()."
        )
    return timesteps


def _require_scale(timesteps: list[float]) -> None:
    """Refuses timesteps that are not on the scale 0 to 1000, such as c_noise of EDM schedulers."""
    for timestep in timesteps:
        if not -0.5 < timestep < LAST + 1.0:
            raise PatchError(
                f"expected timesteps from 0 to 1000 for a schedule, or for a patch of a part of "
                f"the timesteps, found {timestep:g}: use a scheduler with this scale (those with "
                "EDM in their name have another), or no schedule."
            )
