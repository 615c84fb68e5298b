"""The configuration of a patch: its base, its sites and the paper's options (Table 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmp_common.bases.base import Base, Place, Prediction, Site
from dmp_common.bases.schedule import EVERYWHERE
from dmp_common.bases.table import get_base
from dmp_common.errors import PatchError, printable
from dmp_common.patch.choices import (
    LATER,
    STAGED,
    AcrossDepth,
    Condition,
    Expert,
    GateForm,
    GateInit,
    GateKind,
    GateUnit,
    GridScope,
    Init,
    Mix,
    Selection,
)
from dmp_common.patch.possible import check_variant

ATTENTION_WIDTH = 64  # channels of query and keys of the attention gate
PAIR = 2  # prompts of a modulating patch come in pairs of a scale and a shift
_PREPENDED = 50  # prompts in front of the sequence (paper, Table 4)
_LONGEST_NAME = 100  # characters of a base's name


@dataclass(frozen=True)
class Variant:
    """The configuration of a patch. Every field is recorded in the file.

    Args:
        base: name of the base.
        sites: names of the sites, in order of depth.
        grid: rows and columns of the prompt grid; None where prompts have no place. By default the
            base's grid; with gate unit "grid" K grids have as many prompts in all as that one.
        prompts: N, which is rows x columns, or the number of prepended prompts. A modulating patch
            has 2: the scale and the shift.
        grids: K, the number of prompt grids of a site; 1 in the paper. A modulating patch has K
            pairs of a scale and a shift.
        gate: "linear" (eq. 3), "attention" (a query from [e ; i], one learned key per prompt), or
            "none" (naive prompt tuning, eq. 2). The paper's literal attention, with one time
            token as the only key, gives constant weights, so we attend over prompts.
        selection: "soft" (softmax weights) or "hard" (the top 75 % with weight 1).
        across_depth: "distinct" (the gate sees the site's depth) or "uniform" (it does not).
        mix: "add" to the block's input; "prepend" tokens (DiT bases, trainer only); or "modulate",
            which is ours: scale and shift each channel of a module's output. The sites of the last
            one are outputs, see `Base.outputs`.
        condition: what the gate sees: "t", or "t+y" (the class embedding too, as officially).
        gate_unit: what has a weight of its own: each "prompt" (eq. 3), or each "grid" as a whole,
            so that a site's field is a mixture of K grids. The paper has no grids.
        gate_form: "softmax" (eq. 3), or "residual": the weight is 1 plus the gate's logit, so that
            it can be zero, negative or large at any noise level. The paper has no such form.
        grid_scope: "patch" if every site has the same grid, or "site" if the grid is that of the
            finest sites and coarser ones have as many prompts as cells, as the paper has it for
            Stable Diffusion. The paper does not say how one linear layer gates grids of several
            sizes; here a coarser site takes the mean of the logits of the cells that it covers.
        prompt_init, gate_init: how the values were initialised for training. "stages", which is
            ours, starts each grid of a residual gate in its own part of the timesteps.
        timesteps: the patch acts from the first timestep to below the second, and is off elsewhere;
            1000 includes the last timestep. Options of training limit it. Not in the paper.
        guidance: the guidance scale that strength 1 of a guidance patch stands for: strength s
            stands for 1 + s (guidance - 1). Such a patch acts on conditional items alone and takes
            the place of the second call. None for other patches. Not in the paper.
        expert: of a base whose models may be one of two experts, the one that the patch was made
            for: that for "high" or that for "low" noise. None for a model that is whole.
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
    grid_scope: GridScope = "patch"
    timesteps: tuple[int, int] = EVERYWHERE
    guidance: float | None = None
    expert: Expert | None = None

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
        modulates = options.get("mix") == "modulate"
        usual = spec.default_outputs if modulates else spec.default_sites
        chosen = options.pop("sites", None)
        place: Place = "output" if modulates else "input"
        sites = spec.select(usual if chosen is None else chosen, place)
        if modulates:
            options = {**_usual_modulation(options), **options}
        elif options.get("mix") == "prepend":
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
    def place(self) -> Place:
        """Where the sites are: at the blocks' inputs, or at the modules' outputs."""
        return "output" if self.mix == "modulate" else "input"

    @property
    def depths(self) -> dict[str, int]:
        """The depth index of every site of the base that a patch of this mix may have."""
        spec = self.base_spec
        return spec.output_depths if self.mix == "modulate" else spec.depths

    @property
    def format_version(self) -> str:
        """The version of the file format that the patch needs: readers of version 1 refuse 2."""
        later = self.mix == "modulate" or self.guidance is not None or self.grid_scope == "site"
        return "2" if later else "1"

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
        return self.base_spec.select(self.sites, self.place)

    def coarseness(self, site: Site) -> int:
        """How many times the grid of a site is coarser than `grid`, in each direction."""
        if self.grid_scope == "patch":
            return 1
        return site.stride // min(other.stride for other in self.base_spec.sites)

    def grid_of(self, site: Site) -> tuple[int, int] | None:
        """The rows and columns of the prompts of a site; None where prompts have no place."""
        if self.grid is None:
            return None
        rows, columns = self.grid
        return rows // self.coarseness(site), columns // self.coarseness(site)

    def prompts_of(self, site: Site) -> int:
        """The number of prompts N of one grid of a site."""
        return self.prompts // self.coarseness(site) ** 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes of the tensors of the patch file, in their order.

        This allocates nothing, so that a file can be checked before any of its tensors is read.
        """
        shapes: dict[str, tuple[int, ...]] = {
            f"prompts.{site.name}": (self.grids, self.prompts_of(site), site.width)
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
        depths = self.depths
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
        spec, sites = get_base(record["base"]), record["sites"]
        depths = spec.output_depths if record["mix"] == "modulate" else spec.depths
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


def _usual_modulation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a modulating patch: four pairs, each for a part of the timesteps."""
    usual: dict[str, Any] = {"grid": None, "prompts": PAIR}
    if options.get("gate") != "none":
        usual |= {"grids": 4, "gate_unit": "grid", "gate_form": "residual"}
        usual["across_depth"] = "uniform"
    return usual


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
