"""Defines a base: where a model family's sites are and where its time embedding comes from.

A base is data. `table.py` lists the few numbers of each base, and a family's file turns them into
a `Base`. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, Protocol

import torch.nn as nn
from torch import Tensor

from dmp_common.bases.parts import (
    NAMINGS,
    Argument,
    ByNaming,
    Late,
    Latent,
    ModelCall,
    Naming,
    Place,
    Probe,
    Site,
    TimeSource,
)
from dmp_common.bases.timenet import TimeNet
from dmp_common.errors import PatchError

__all__ = [
    "NAMINGS",
    "Argument",
    "Base",
    "ByNaming",
    "Guided",
    "Latent",
    "LatentOf",
    "Layout",
    "ModelCall",
    "Naming",
    "Place",
    "Prediction",
    "Probe",
    "Row",
    "Site",
    "TimeSource",
    "find_module",
    "grid_cells",
]

Layout = Literal["map", "tokens"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Guided = Literal["unconditional first", "conditional first", "calls"]
LatentOf = Callable[["Base", ModelCall, nn.Module], Latent]


@dataclass(frozen=True)
class Base:
    """Describes a frozen model family.

    Args:
        name: what users type and what the patch file records.
        sites: all sites in order of depth; a site's index in this list is its depth input i.
        layout: feature maps (B, D, H, W) or image tokens (B, H*W, D).
        embedding: size E of the time embedding.
        sinusoid: channels of the sinusoid that the time embedding is computed from.
        time_hidden: channels between the two layers of the time embedding. None means E.
        time_bias: the two layers of the time embedding have biases.
        time_constants: numbers whose sinusoids follow that of the timestep, and their channels.
        time_net: the module of the time embedding as it is in files, where it is not two linear
            layers with SiLU between them.
        times: where the time embedding comes from, for each naming.
        probes: how the model is recognised, for each naming.
        latent: for each naming, the function of the family that reads the size of the latents from
            the arguments of a forward call. Only bases with the layout "tokens" need it; without
            it the first argument must be a latent (B, C, H, W).
        site_sets: named choices of sites besides "all".
        default_sites: the choice that a new patch takes.
        prediction: what the family's models usually predict; a patch records its own.
        frequency_shift: `downscale_freq_shift` of the sinusoid.
        inverted: the model counts from noise to picture: its sinusoid is that of 1000 - timestep.
        sinusoid_scale: factor of the (inverted) timestep in the sinusoid.
        sines_first: whether the sines of the sinusoid come before its cosines.
        grid: rows and columns of the default prompt grid.
        labels: argument of the model that carries class labels, where the base has them.
        shared: text and image tokens share a sequence, in all blocks or in some.
        architecture: first part of the `modelspec.architecture` of a patch.
        hub_id: the usual source of the weights, for model cards and the trainer.
        outputs: the outputs of modules that a patch can scale and shift, in the order in which the
            model computes them; a site's index is its depth input. They may be given as a function
            that returns them. They take no part in recognising a model.
        output_sets: named choices of outputs besides "all", or a function that returns them.
        default_outputs: the choice that a new modulating patch takes.
        switch: for a model that may be one of two experts of one architecture, the timestep below
            which the one for low noise takes over; None for others.
        kept: arguments of a call that keep keys and values of other tokens from one step to the
            next; calls with a modulating patch, which changes them at every step, get None there,
            or are refused where the argument is needed.
        guided: how its pipelines in diffusers guide: in one call, with the unconditional or the
            conditional items first, or in two calls, of which the conditional one comes first.
        positions, caption_mask: arguments of earlier versions, which are refused.
    """

    name: str
    sites: tuple[Site, ...]
    layout: Layout
    embedding: int
    sinusoid: int
    times: Mapping[Naming, TimeSource]
    probes: Mapping[Naming, tuple[Probe, ...]]
    site_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default_sites: str = "all"
    prediction: Prediction = "epsilon"
    frequency_shift: float = 0.0
    inverted: bool = False
    sinusoid_scale: float = 1.0
    time_hidden: int | None = None
    grid: tuple[int, int] = (16, 16)
    labels: Argument | None = None
    positions: InitVar[Argument | None] = None
    shared: bool = False
    caption_mask: InitVar[Argument | None] = None
    architecture: str = ""
    hub_id: str | None = None
    latent: Mapping[Naming, LatentOf] = field(default_factory=dict)
    time_bias: bool = True
    outputs: Late[tuple[Site, ...]] = Late(tuple)  # noqa: RUF009 - a descriptor
    output_sets: Late[Mapping[str, tuple[str, ...]]] = Late(dict)  # noqa: RUF009
    default_outputs: str = "linear"
    time_constants: tuple[tuple[float, int], ...] = ()
    time_net: TimeNet | None = None
    sines_first: bool = False
    switch: float | None = None
    kept: tuple[Argument, ...] = ()
    guided: Guided = "unconditional first"

    def __post_init__(self, positions: Argument | None, caption_mask: Argument | None) -> None:
        for name, value in (("positions", positions), ("caption_mask", caption_mask)):
            if value is not None:
                raise PatchError(
                    f"base {self.name}: expected the field `latent`, found `{name}`, which is no "
                    "longer a field: write a function of (base, call, denoiser) that returns a "
                    f"dmp_common.bases.base.Latent, read {value.name!r} in it with "
                    f"call.get({value!r}), and give latent={{'diffusers': that_function}}."
                )
        latent = dict(self.latent)
        if self.layout == "tokens":
            latent = {"diffusers": hidden_states_latent, "ldm": x_latent, **latent}
        facts: dict[str, Mapping[Naming, Any]] = {
            "times": self.times,
            "probes": self.probes,
            "latent": latent,
        }
        for name, given in facts.items():
            object.__setattr__(self, name, ByNaming(given, f"`{name}` of base {self.name}"))

    @property
    def depths(self) -> dict[str, int]:
        """Maps each input site's name to its position i in the full list (eq. 3)."""
        return {site.name: depth for depth, site in enumerate(self.sites)}

    @property
    def output_depths(self) -> dict[str, int]:
        """Maps each output site's name to its position i in the full list of outputs."""
        return {site.name: depth for depth, site in enumerate(self.outputs)}

    def timesteps_of(self, expert: str) -> tuple[int, int]:
        """Returns the timesteps of an expert, "high" or "low"; all of a base without experts."""
        if self.switch is None:
            return 0, 1000
        switch = round(self.switch)
        return (switch, 1000) if expert == "high" else (0, switch)

    def select(self, choice: str | int | Sequence[str], place: Place = "input") -> tuple[Site, ...]:
        """Returns the sites of a choice, in order of depth.

        Args:
            choice: "all", a named set, the number of first sites, or site names.
            place: whether to choose among the blocks' inputs or the modules' outputs.

        Raises:
            PatchError: an unknown set or site, or a choice without any site.
        """
        sites, sets = self.sites, self.site_sets
        if place == "output":
            sites, sets = self.outputs, self.output_sets
            if not sites:
                raise PatchError(
                    f"base {self.name} has no output sites, which a modulating patch needs: give "
                    "the base `outputs`, or use a patch of another mix."
                )
        known = tuple(site.name for site in sites)
        if isinstance(choice, str):
            sets = {"all": known, **sets}
            if choice not in sets:
                raise PatchError(
                    f"base {self.name} has no site set {choice!r}: choose one of "
                    f"{', '.join(sets)}, a number of first sites, or a list of site names."
                )
            names: Sequence[str] = sets[choice]
        elif isinstance(choice, int):
            if isinstance(choice, bool) or not 1 <= choice <= len(sites):
                raise PatchError(
                    f"base {self.name} has {len(sites)} sites: the first {choice} cannot "
                    f"be chosen, give a number from 1 to {len(sites)}."
                )
            names = known[:choice]
        elif isinstance(choice, Sequence):
            names = list(choice)
        else:
            raise PatchError(
                f"base {self.name}: expected a site set, a number of first sites or a list of "
                f"site names, found {choice!r}: give one of these."
            )
        _require_names(self.name, names, known)
        chosen = set(names)
        return tuple(site for site in sites if site.name in chosen)


_LISTED = 80  # names of sites that an error message lists


def _require_names(base: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a list of site names that is empty, or has unknown or repeated names."""
    there = set(known)
    unknown = [name for name in names if not isinstance(name, str) or name not in there]
    if unknown or not names or len(set(names)) != len(names):
        found = ", ".join(map(str, unknown)) or ("repeated names" if names else "none")
        listed = ", ".join(known[:_LISTED]) + ", ..." * (len(known) > _LISTED)
        raise PatchError(
            f"base {base}: expected one or more of the sites {listed}, each "
            f"once, found {found}; use names from this list."
        )


class Row(Protocol):
    """Defines what every row of the table has: the numbers of one base, which make a `Base`."""

    @property
    def name(self) -> str:
        """Returns the name of the base."""

    def base(self) -> Base:
        """Returns the base of these numbers."""


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the submodule at a dotted path, or None where there is none."""
    module: nn.Module | None = model
    for part in path.split("."):
        module = getattr(module, "_modules", {}).get(part)
        if module is None:
            return None
    return module


def grid_cells(latent: int, stride: int) -> int:
    """Returns how many cells a site's grid has along one side of the latent, at least 1.

    Models that cut the latent into tokens drop an incomplete one.
    """
    return max(latent // stride, 1)


def map_latent(base: Base, sample: Any) -> Latent:
    """Returns the latents of a call with a batch of maps (B, C, H, W) or (B, C, 1, H, W).

    Raises:
        PatchError: another sample.
    """
    if not isinstance(sample, Tensor) or sample.dim() < 4:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise PatchError(
            f"expected a latent (B, C, H, W) in the call of a model of base {base.name}, found "
            f"{found}: call the model with its usual arguments, or give the base a `latent` "
            "function that reads them."
        )
    return Latent(len(sample), (sample.shape[-2], sample.shape[-1]))


def hidden_states_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of diffusers' transformers that take maps."""
    return map_latent(base, call.get(Argument("hidden_states", 0)))


def x_latent(base: Base, call: ModelCall, denoiser: nn.Module) -> Latent:
    """Returns the latents of the original and the hosts' transformers that take maps."""
    return map_latent(base, call.get(Argument("x", 0)))
