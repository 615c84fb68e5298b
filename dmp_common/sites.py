"""A site: one block input of a base, where a patch adds its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn as nn

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
