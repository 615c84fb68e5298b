"""The configuration of a patch: its base, its sites and the paper's options (Table 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmp_common.bases.base import Base, Prediction, Site
from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.bases.table import get_base
from dmp_common.errors import PatchError, printable
from dmp_common.patch.choices import (
    LATER,
    STAGED,
    AcrossDepth,
    Condition,
    GateForm,
    GateInit,
    GateKind,
    GateUnit,
    Init,
    Mix,
    Selection,
)
from dmp_common.patch.possible import check_variant

ATTENTION_WIDTH = 64  # channels of query and keys of the attention gate
_PREPENDED = 50  # prompts in front of the sequence (paper, Table 4)
_LONGEST_NAME = 100  # characters of a base's name


@dataclass(frozen=True)
class Variant:
    """The configuration of a patch. Every field is recorded in the file.

    Args:
        base: name of the base.
        sites: names of the sites, in order of depth.
        grid: rows and columns of the prompt grid; None where prompts are prepended. By default the
            base's grid; with gate unit "grid" K grids have as many prompts in all as that one.
        prompts: N, which is rows x columns, or the number of prepended prompts.
        grids: K, the number of prompt grids of a site; 1 in the paper.
        gate: "linear" (eq. 3), "attention" (a query from [e ; i], one learned key per prompt), or
            "none" (naive prompt tuning, eq. 2). The paper's literal attention, with one time
            token as the only key, gives constant weights, so we attend over prompts.
        selection: "soft" (softmax weights) or "hard" (the top 75 % with weight 1).
        across_depth: "distinct" (the gate sees the site's depth) or "uniform" (it does not).
        mix: "add" to the block's input, or "prepend" tokens (DiT bases, trainer only).
        condition: what the gate sees: "t", or "t+y" (the class embedding too, as officially).
        gate_unit: what has a weight of its own: each "prompt" (eq. 3), or each "grid" as a whole,
            so that a site's field is a mixture of K grids. The paper has no grids.
        gate_form: "softmax" (eq. 3), or "residual": the weight is 1 plus the gate's logit, so that
            it can be zero, negative or large at any noise level. The paper has no such form.
        prompt_init, gate_init: how the values were initialised for training. "stages", which is
            ours, starts each grid of a residual gate in its own part of the timesteps.
        timesteps: the patch acts from the first timestep to below the second, and is off elsewhere;
            1000 includes the last timestep. Options of training limit it. Not in the paper.
        frequency_shift: of the sinusoid that e is computed from; a model with another is refused.
        prediction: what the base predicted when the patch was trained.

    Raises:
        PatchError: a value, or a combination of values, is not possible.

    Source: Ham et al. 2025, eqs. 2-3 and Table 4.
    """

    base: str
    sites: tuple[str, ...]
    grid: tuple[int, int] | None
    prompts: int
    frequency_shift: float
    prediction: Prediction
    grids: int = 1
    gate: GateKind = "linear"
    selection: Selection = "soft"
    across_depth: AcrossDepth = "distinct"
    mix: Mix = "add"
    condition: Condition = "t"
    prompt_init: Init = "zero"
    gate_init: GateInit = "zero"
    gate_unit: GateUnit = "prompt"
    gate_form: GateForm = "softmax"
    timesteps: tuple[int, int] = EVERYWHERE

    @classmethod
    def create(cls, base: str | Base, **options: Any) -> Variant:
        """Makes a variant from a base and the options that differ from its defaults.

        Args:
            base: a base or its name.
            options: fields of `Variant`; `sites` may be "all", a named set, the number of first
                sites or a list of names; `grid` may be one number for a square grid.
        """
        spec = get_base(base) if isinstance(base, str) else base
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "base"]
        unknown = sorted(set(options) - set(fields))
        if unknown:
            raise PatchError(
                f"unknown option {', '.join(unknown)} of a patch: choose from {', '.join(fields)}."
            )
        chosen = options.pop("sites", None)
        sites = spec.select(spec.default_sites if chosen is None else chosen)
        if options.get("mix") == "prepend":
            options.setdefault("prompts", _PREPENDED)
            options.setdefault("grid", None)
        else:
            grid = options.get("grid", _usual_grid(spec, options))
            options["grid"] = (grid, grid) if isinstance(grid, int) else _pair(grid)
            options.setdefault("prompts", options["grid"][0] * options["grid"][1])
        if options.get("gate_unit") == "grid" and options.get("gate") != "none":
            # Grids that start equal would stay equal.
            fitting = all(options.get(n, getattr(cls, n)) == value for n, value in STAGED.items())
            options.setdefault("gate_init", "stages" if fitting else "random")
        if "timesteps" in options:
            options["timesteps"] = _pair(options["timesteps"], "timesteps as first and last")
        options.setdefault("frequency_shift", spec.frequency_shift)
        options.setdefault("prediction", spec.prediction)
        return cls(base=spec.name, sites=tuple(site.name for site in sites), **options)

    def __post_init__(self) -> None:
        check_variant(self)

    @property
    def count(self) -> int:
        """The number of prompts of one site, K * N."""
        return self.grids * self.prompts

    @property
    def outputs(self) -> int:
        """The number of logits of the gate at one site: one per prompt, or one per grid."""
        return self.grids if self.gate_unit == "grid" else self.count

    @property
    def gate_inputs(self) -> Literal["e", "e+i"]:
        """The gate's inputs: the time embedding alone ("e"), or also the depth ("e+i")."""
        return "e" if self.across_depth == "uniform" else "e+i"

    @property
    def base_spec(self) -> Base:
        """The base that `base` names."""
        return get_base(self.base)

    def site_specs(self) -> tuple[Site, ...]:
        """Returns the chosen sites as `Site` objects, in order of depth."""
        return self.base_spec.select(self.sites)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes of the tensors of the patch file, in their order.

        This allocates nothing, so that a file can be checked before any of its tensors is read.
        """
        shapes: dict[str, tuple[int, ...]] = {
            f"prompts.{site.name}": (self.grids, self.prompts, site.width)
            for site in self.site_specs()
        }
        inputs = self.base_spec.embedding + (self.gate_inputs == "e+i")
        if self.gate == "linear":
            shapes |= {"gate.weight": (self.outputs, inputs), "gate.bias": (self.outputs,)}
        elif self.gate == "attention":
            shapes["gate.query"] = (ATTENTION_WIDTH, inputs)
            shapes["gate.key"] = (self.outputs, ATTENTION_WIDTH)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Returns the entries of the patch file; each site has its depth index."""
        record = dataclasses.asdict(self)
        depths = self.base_spec.depths
        record["sites"] = {name: depths[name] for name in self.sites}
        record["grid"] = None if self.grid is None else list(self.grid)
        record["timesteps"] = list(self.timesteps)
        for name, usual in LATER.items():
            if record[name] == usual:
                del record[name]
        return record

    def described(self) -> dict[str, Any]:
        """Returns the entries of `to_json`, and those that the file leaves out."""
        return {**LATER, **self.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Variant:
        """Makes the variant of a record of `to_json`; unknown or missing entries are refused."""
        record = {**LATER, **record}
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(record) != expected:
            found = printable(", ".join(sorted(map(str, record))) or "none", 600)
            raise PatchError(
                f"expected the entries {', '.join(sorted(expected))}, found {found}: update this "
                "software, or export the patch again."
            )
        if not isinstance(record["base"], str) or len(record["base"]) > _LONGEST_NAME:
            found = printable(repr(record["base"]))
            raise PatchError(f"expected the name of a base, found {found}: export again.")
        depths = get_base(record["base"]).depths
        sites = record["sites"]
        if (
            not isinstance(sites, dict)
            or not sites
            or any(type(i) is not int or depths.get(name) != i for name, i in sites.items())
        ):
            raise PatchError(
                f"expected sites of base {record['base']} with their depth "
                f"({printable(depths, 600)}), found {printable(sites)}: the file was made for "
                "another base or by another tool."
            )
        return cls(
            **{
                **record,
                "sites": tuple(sorted(sites, key=lambda name: depths[name])),
                "grid": None if record["grid"] is None else _pair(record["grid"]),
                "timesteps": _pair(record["timesteps"], "timesteps as first and last"),
            }
        )


def _usual_grid(spec: Base, options: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the base's grid, or a coarser one for a mixture, which then has as many prompts."""
    grids = options.get("grids", 1)
    if options.get("gate_unit") != "grid" or type(grids) is not int or grids < 1:
        return spec.grid
    rows, columns = (max(1, round(side / math.sqrt(grids))) for side in spec.grid)
    return rows, columns


def _pair(value: object, what: str = "a grid as rows and columns") -> tuple[int, int]:
    whole = isinstance(value, Sequence) and [side for side in value if type(side) is int]
    if not whole or len(whole) != 2 or len(value) != 2:  # type: ignore[arg-type]
        raise PatchError(f"expected {what}, found {printable(value)}: give two whole numbers.")
    return whole[0], whole[1]
