"""What a base is: where a model family's sites lie and where its time embedding comes from.

A base is data. `families/` turns a family's few numbers into a `Base`, `registry.py` lists the
numbers. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from dmp_common.bases.schedule import LAST
from dmp_common.errors import PatchError

Naming = Literal["diffusers", "ldm"]
NAMINGS: tuple[Naming, ...] = ("diffusers", "ldm")


@dataclass(frozen=True)
class Argument:
    """Which argument of a module's forward call carries a value.

    Blocks and models are called by position in some hosts and by keyword in others.
    """

    name: str
    index: int


@dataclass(frozen=True)
class Site:
    """One block input.

    Args:
        name: permanent, host-neutral name; the key of the tensor in a patch file.
        width: channels D of the block's own input stream (without a skip connection).
        stride: latent pixels per grid cell of this site, in each direction.
        paths: module whose input is the site, for each naming.
        arguments: the argument of that module which carries the stream, for each naming.
    """

    name: str
    width: int
    stride: int
    paths: Mapping[Naming, str]
    arguments: Mapping[Naming, Argument]


Layout = Literal["map", "tokens"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class TimeSource:
    """Where the pure time embedding e (T, E) of a model comes from.

    Args:
        path: the module whose output is e, before class, text, guidance or size embeddings.
        argument: the argument of the model's forward that carries the timestep.
        mlp: the module that maps the sinusoid of a timestep to e.
        projection: the module that knows the sinusoid's `downscale_freq_shift`, where there is
            one; elsewhere the shift is the base's own.
        scale: the argument times this is the timestep on the scale 0..1000.
        inverted: the argument rises from noise to picture: what it gives is 1000 - timestep.
        inside: e is computed inside a block, after the block's input is needed, so we compute it
            before the first site (diffusers' DiT). `path` then takes (timestep, labels).
        labels: the module that embeds class labels, where the base has them; its `embedding_table`
            is the table.
    """

    path: str
    argument: Argument
    mlp: str
    projection: str | None = None
    scale: float = 1.0
    inverted: bool = False
    inside: bool = False
    labels: str | None = None

    def timesteps(self, argument: Tensor) -> Tensor:
        """Timesteps, 1000 (noise) to 0 (picture), of the model's argument; any shape."""
        scaled = argument * self.scale
        # Near 1 a float32 knows a timestep to 6e-5 only; the ends of a schedule are to be met.
        return torch.round(LAST - scaled, decimals=3) if self.inverted else scaled


@dataclass(frozen=True)
class Probe:
    """A fact by which a model is recognised: `attribute` of the module at `path` has `value`.

    With `attribute` None the module must be there (`value` True) or must not (`value` False).
    """

    path: str
    attribute: str | None
    value: object


@dataclass(frozen=True)
class Base:
    """A frozen model family.

    Args:
        name: what users type and what the patch file records.
        sites: all sites in order of depth; a site's index in this list is its depth input i.
        layout: feature maps (B, D, H, W) or image tokens (B, H*W, D).
        embedding: size E of the time embedding.
        sinusoid: channels of the sinusoid the time embedding is computed from.
        time_hidden: channels between the two layers of the time embedding, None where they are E.
        times: where the time embedding comes from, for each naming.
        probes: how the model is recognised, for each naming.
        site_sets: named choices of sites besides "all".
        default_sites: the choice a new patch takes.
        prediction: what the family's models usually predict; a patch records its own.
        frequency_shift: `downscale_freq_shift` of the sinusoid.
        inverted: the model counts from noise to picture: its sinusoid is that of 1000 - timestep.
        sinusoid_scale: what the (inverted) timestep is multiplied by in the sinusoid.
        grid: rows and columns of the default prompt grid.
        labels: argument of the model that carries class labels, where the base has them.
        positions: argument that tells rows and columns, where the latent is packed: position ids
            (Flux) or shapes (Qwen-Image).
        shared: text and image tokens share a sequence, in all blocks or in some.
        caption_mask: argument that masks the captions (B, L), where the image tokens of each item
            follow right after its own caption (Lumina 2 in diffusers).
        architecture: first part of the `modelspec.architecture` of a patch.
        hub_id: the usual source of the weights, for model cards and the trainer.
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
    positions: Argument | None = None
    shared: bool = False
    caption_mask: Argument | None = None
    architecture: str = ""
    hub_id: str | None = None

    @property
    def depths(self) -> dict[str, int]:
        """Site name to its position i in the full list (eq. 3)."""
        return {site.name: depth for depth, site in enumerate(self.sites)}

    def select(self, choice: str | int | Sequence[str]) -> tuple[Site, ...]:
        """The sites of a choice, in order of depth.

        Args:
            choice: "all", a named set, the number of first sites, or site names.

        Raises:
            PatchError: an unknown set or site, or a choice without any site.
        """
        known = self.depths
        if isinstance(choice, str):
            sets = {"all": tuple(known), **self.site_sets}
            if choice not in sets:
                raise PatchError(
                    f"base {self.name} has no site set {choice!r}: choose one of "
                    f"{', '.join(sets)}, a number of first sites, or a list of site names."
                )
            names: Sequence[str] = sets[choice]
        elif isinstance(choice, int):
            if isinstance(choice, bool) or not 1 <= choice <= len(self.sites):
                raise PatchError(
                    f"base {self.name} has {len(self.sites)} sites: the first {choice} cannot "
                    f"be chosen, give a number from 1 to {len(self.sites)}."
                )
            names = list(known)[:choice]
        elif isinstance(choice, Sequence):
            names = list(choice)
        else:
            raise PatchError(
                f"base {self.name}: expected a site set, a number of first sites or a list of "
                f"site names, found {choice!r}: give one of these."
            )
        unknown = [name for name in names if not isinstance(name, str) or name not in known]
        if unknown or not names or len(set(names)) != len(names):
            found = ", ".join(map(str, unknown)) or ("repeated names" if names else "none")
            raise PatchError(
                f"base {self.name}: expected one or more of the sites {', '.join(known)}, each "
                f"once, found {found}; use names from this list."
            )
        return tuple(site for site in self.sites if site.name in set(names))


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None where there is none."""
    module: nn.Module | None = model
    for part in path.split("."):
        module = getattr(module, "_modules", {}).get(part)
        if module is None:
            return None
    return module


def grid_cells(latent: int, stride: int) -> int:
    """Cells of a site's grid along one side of the latent, as patchifying models count them."""
    return max(latent // stride, 1)
