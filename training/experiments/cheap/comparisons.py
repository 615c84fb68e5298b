"""What the study of cheap calls compares; docs/RESULTS.md says why, and said so before the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from training.experiments.cheap.calls import EXACT
from training.experiments.cheap.measures import USUAL, CheapJob, UseOfModel
from training.experiments.cheap.remedies import REMEDIES

SUBJECTS = ("digits", "cifar10-s")
SEEDS = (101, 102, 103, 104, 105)
STEPS = 400
BITS_4, BITS_3, BITS_2 = "rtn4-group32", "rtn3-group32", "rtn2-group32"
GUIDED = "guidance-2"
# Bytes of "modulation" in half precision: 18,432 values of pairs and 260 of the gate.
MIXED = f"mixed precision {2 * (18_432 + 260)}"
EQUAL_CALLS = UseOfModel(steps=10, guidance=2.0)  # as many calls as 20 steps of one
SIBLING = "-sibling"  # behind the name of a base: a fine-tune of it
BASES_PATCH = "repair of the base"  # on a sibling
ON_SIBLING = ("none", "bias correction", "repair", BASES_PATCH)
Rates = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Model:
    """A model of the study: what repairs a call, and how it is used."""

    call: str
    method: str
    use: UseOfModel = USUAL


@dataclass(frozen=True)
class Comparison:
    """A primary comparison: which of two models' pictures are nearer to the full model's?

    Args:
        name: of what ours is compared with.
        ours, other: the models.
    """

    name: str
    ours: Model
    other: Model


_REPAIR = Model(BITS_3, "repair")
COMPARISONS = (
    Comparison("bias correction", _REPAIR, Model(BITS_3, "bias correction")),
    Comparison("channel fit, without training", _REPAIR, Model(BITS_3, "channel fit")),
    Comparison("LoRA of equal size", _REPAIR, Model(BITS_3, "lora")),
    Comparison("more bits at equal bytes", Model(BITS_3, "modulation"), Model(BITS_3, MIXED)),
    Comparison(
        "no gate at equal size", Model(BITS_3, "gated-small"), Model(BITS_3, "ungated-small")
    ),
    Comparison(
        "guidance at equal calls", Model(GUIDED, "repair"), Model(GUIDED, "full model", EQUAL_CALLS)
    ),
)
GOALS = {BITS_4: 0.10, BITS_3: 0.20}  # what a repair may leave
_OF_GOALS = [Model(call, name) for call in GOALS for name in ("none", "full model", "repair")]
# What shares are of, beside what is compared.
_BESIDE = [
    *_OF_GOALS, Model(GUIDED, "none"), Model(GUIDED, "full model", UseOfModel(guidance=2.0)),
]  # fmt: skip


def of_goals(subject: str, rates: Rates) -> list[CheapJob]:
    """The jobs of the goals alone, on the test split."""
    return [job(subject, model, rates, seed) for seed in SEEDS for model in _OF_GOALS]


def primary(subject: str, rates: Rates) -> list[CheapJob]:
    """The jobs of the primary comparisons and the goals, on the test split."""
    models = dict.fromkeys([*_BESIDE, *(m for one in COMPARISONS for m in (one.ours, one.other))])
    return [job(subject, model, rates, seed) for seed in SEEDS for model in models]


def job(subject: str, model: Model, rates: Rates, seed: int, steps: int = STEPS) -> CheapJob:
    """The job of a model.

    Its rate is the one chosen for its kind of call. A method that was not tuned there, which only
    exploration has, takes the rate at which its tuning would begin.
    """
    if model.method not in REMEDIES:  # nothing is trained
        return CheapJob(subject, model.call, model.method, 0.0, 0, seed, "test", model.use)
    rate = rates.get((kind(model.call), model.method), REMEDIES[model.method].start)
    return CheapJob(subject, model.call, model.method, rate, steps, seed, "test", model.use)


def kind(call: str) -> str:
    """The call on which rates for this call are chosen."""
    if call == EXACT:
        return EXACT
    return GUIDED if call.startswith("guidance") else BITS_3


# Exploration: one seed on test, rates chosen as for the primary comparisons.
_CONTROLS = ("none", "bias correction", "channel fit", "gptq", "repair", "lora", "modulation")
_METHODS = (
    "ungated", "modulation-ungated", "lora-modulation", "t-lora", "full", "repair-2", "repair-8",
    "lora-small", "prompts", "prompts-stages", "prompts-residual", "prompts-ungated", "paper",
    "gptq", "mixed precision 92680",
)  # fmt: skip
_STRENGTHS = [UseOfModel(strength=value) for value in (0.5, 0.9, 1.1, 1.25, 1.5)]
_SAMPLERS = [
    UseOfModel(steps=10), UseOfModel(steps=50), UseOfModel(sampler="ddim"),
    UseOfModel(sampler="ddim", steps=50),
]  # fmt: skip
EXPLORED: dict[str, list[Model]] = {
    "methods": [Model(BITS_3, name) for name in _METHODS],
    "bits": [
        Model(call, name) for call in (BITS_2, BITS_4, "rtn3", "rtn4") for name in _CONTROLS
        if not (name == "gptq" and "group" not in call)
    ],
    "guidance": [
        *(Model(GUIDED, name) for name in ("modulation", "lora", "prompts")),
        *(Model(GUIDED, "full model", UseOfModel(steps=n, guidance=2.0)) for n in (5, 15)),
        *(Model(GUIDED, name, UseOfModel(steps=10)) for name in ("none", "repair")),
        *(Model("guidance-1.5", name) for name in ("none", "repair")),
        Model("guidance-1.5", "full model", UseOfModel(steps=10, guidance=1.5)),
        *(Model(f"{BITS_3}+{GUIDED}", name) for name in ("none", "repair")),
    ],
    "other calls": [
        *(Model("skip2", name) for name in ("none", "repair", "lora")),
        *(Model("gptq3-group32", name) for name in ("none", "repair", "modulation")),
        *(Model("gptq2-group32", name) for name in ("none", "repair")),
        *(Model(f"rtn{n}-group32", "none") for n in (5, 6)),
    ],
    "images": [Model(BITS_3, name) for name in ("repair-tenth", "repair-hundredth")],
    "full model": [
        Model(EXACT, "none"), Model(EXACT, "data"), Model(EXACT, "clean"),
    ],
    "use": [Model(BITS_3, "repair", use) for use in _STRENGTHS + _SAMPLERS]
    + [Model(BITS_3, name, use) for name in ("none", "full model") for use in _SAMPLERS],
}  # fmt: skip


# Controls with epsilon scaling, whose factor is chosen on validation.
SCALED = (
    *(Model(EXACT, name) for name in ("none", "data", "clean")),
    *(Model(BITS_3, name) for name in ("none", "repair")),
)


def explored(subject: str, name: str, rates: Rates) -> list[CheapJob]:
    """The jobs of a part of the exploration."""
    if (subject, name) == ("digits", "images"):
        return []  # Their split is fixed.
    return [job(subject, model, rates, SEEDS[0]) for model in EXPLORED[name]]


def on_sibling(subject: str, rates: Rates) -> list[CheapJob]:
    """A fine-tune of the base in few bits: as it is, with the base's patch, with one of its own."""
    found = []
    for name in ON_SIBLING:
        own = Model(BITS_3, "repair" if name == BASES_PATCH else name)
        one = job(subject, own, rates, SEEDS[0])
        found.append(replace(one, subject=f"{subject}{SIBLING}", method=name))
    return found


def trained_longer(subject: str, rates: Rates, steps: tuple[int, ...]) -> list[CheapJob]:
    """How many steps a repair takes."""
    model = Model(BITS_3, "repair")
    return [replace(job(subject, model, rates, SEEDS[0]), steps=count) for count in steps]
