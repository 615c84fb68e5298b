"""Checks the configuration of a patch: values, and combinations of them, that are possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.bases.table import get_base
from dmp_common.errors import PatchError, printable
from dmp_common.patch.choices import CHOICES, STAGED, Expert

if TYPE_CHECKING:
    from dmp_common.patch.variant import Variant

_GUIDANCE = 100  # more than any use needs
_LIMIT = 1 << 16  # prompts of one site; far more than any use needs, too few to exhaust memory


def check_variant(variant: Variant) -> None:
    """Refuses values, and combinations of values, that are not possible.

    Raises:
        PatchError: the first one that is found.
    """
    for name, choices in CHOICES.items():
        if getattr(variant, name) not in choices:
            raise PatchError(
                f"expected {name} to be one of {', '.join(choices)}, found "
                f"{printable(repr(getattr(variant, name)))}: choose one of these."
            )
    _check_counts(variant)
    spec = get_base(variant.base)
    if tuple(site.name for site in spec.select(variant.sites, variant.place)) != variant.sites:
        raise PatchError(f"expected the sites of {variant.base} in order of depth: sort them.")
    if variant.expert is not None and (
        spec.switch is None or variant.expert not in get_args(Expert)
    ):
        known = "none, because its models are whole" if spec.switch is None else "high or low"
        raise PatchError(
            f"expected as the expert of base {variant.base} {known}, found "
            f"{printable(repr(variant.expert))}: correct it, or leave it out."
        )
    if variant.condition == "t+y" and spec.labels is None:
        raise PatchError(f"base {variant.base} has no class labels: use condition t.")
    if variant.mix == "prepend" and spec.labels is None:
        raise PatchError(
            f"prompts can be prepended on DiT bases only, not {variant.base}: use add."
        )
    if variant.gate == "none" and (variant.selection, variant.across_depth) != ("soft", "distinct"):
        raise PatchError("a patch without gate selects nothing: leave selection and depth out.")
    ours = (variant.gate_unit, variant.gate_form) != ("prompt", "softmax")
    if ours and (variant.gate == "none" or variant.selection == "hard"):
        raise PatchError(
            f"expected a gate with soft selection for gate unit {variant.gate_unit} and form "
            f"{variant.gate_form}, found gate {variant.gate}, selection {variant.selection}: leave "
            "the unit and the form out."
        )
    if variant.grid_scope == "site":
        _check_site_grids(variant)
    staged = all(getattr(variant, name) == value for name, value in STAGED.items())
    if variant.gate_init == "stages" and not staged:
        raise PatchError(
            "expected a linear residual gate of grids that sees the timestep alone for gate "
            f"init stages, found gate {variant.gate}, unit {variant.gate_unit}, form "
            f"{variant.gate_form}, condition {variant.condition}: use gate init random."
        )


def _check_site_grids(variant: Variant) -> None:
    """Refuses grids of their own for sites where they are not possible or mean nothing."""
    form = (variant.mix, variant.grids, variant.gate_unit, variant.gate_form, variant.selection)
    if form != ("add", 1, "prompt", "softmax", "soft"):
        raise PatchError(
            "expected added prompts in one grid, with a soft gate or none, for grid scope site, "
            f"found mix {variant.mix}, {variant.grids} grids, gate unit {variant.gate_unit}, form "
            f"{variant.gate_form}, selection {variant.selection}: use grid scope patch."
        )
    coarsest = max(map(variant.coarseness, variant.base_spec.sites))
    if coarsest == 1:
        raise PatchError(
            f"expected a base with sites of several sizes for grid scope site, found "
            f"{variant.base}, whose sites have one: use grid scope patch."
        )
    if variant.grid is None or any(side % coarsest for side in variant.grid):
        raise PatchError(
            f"expected rows and columns divisible by {coarsest} for grid scope site, found grid "
            f"{printable(variant.grid)}: the coarsest sites have that many times fewer."
        )


def _check_counts(variant: Variant) -> None:
    if type(variant.grids) is not int or type(variant.prompts) is not int:
        raise PatchError("expected whole numbers of grids and prompts: give integers.")
    if variant.mix == "modulate":
        unit = "prompt" if variant.gate == "none" else "grid"
        shaped = variant.grid is None and variant.prompts == 2 and variant.gate_unit == unit
    elif variant.mix == "prepend":
        shaped = variant.grid is None
    else:
        grid = variant.grid
        shaped = (
            isinstance(grid, tuple)
            and len(grid) == 2
            and all(type(side) is int and side > 0 for side in grid)
            and grid[0] * grid[1] == variant.prompts
        )
    if not shaped or not (variant.prompts >= 1 and variant.grids >= 1):
        raise PatchError(
            f"expected a grid of rows x columns prompts (none when prompts are prepended; none, 2 "
            f"prompts and gate unit grid with mix modulate), "
            f"found grid {printable(variant.grid)}, {variant.prompts} prompts, {variant.grids} "
            "grids: make them agree."
        )
    if variant.prompts * variant.grids > _LIMIT:
        raise PatchError(
            f"expected at most {_LIMIT} prompts a site, found {variant.prompts * variant.grids}: "
            "use a smaller grid."
        )
    if type(variant.frequency_shift) not in (int, float) or not 0 <= variant.frequency_shift <= 2:
        raise PatchError(
            "expected a frequency shift of 0 or 1, found "
            f"{printable(variant.frequency_shift)}: set it."
        )
    scale = variant.guidance
    if scale is not None and (type(scale) not in (int, float) or not 1 < scale <= _GUIDANCE):
        raise PatchError(
            f"expected a guidance scale above 1 and at most {_GUIDANCE}, found "
            f"{printable(scale)}: correct it, or leave it out."
        )
    low, high = variant.timesteps
    if not 0 <= low < high <= EVERYWHERE[1]:
        raise PatchError(
            f"expected timesteps from one number to a higher one, both from 0 to "
            f"{EVERYWHERE[1]}, found {low} to {high}: correct them."
        )
