"""The stages of the run, in two parts, the most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu import company, kernels, memory, numbers, speed, worth
from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup
from tests.tiny import FAMILIES


def _modulating(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    # Of blocks that are compiled by themselves such a patch makes eager ones again.
    speed.compiled_model(setup, part, base, latent, batch, "modulate")


# Name of the kind, function, (base, side of the latent, batch), seconds.
Measured = tuple[str, Callable[..., None], tuple[str, int, int], float]
# A small batch leaves a fast card waiting for the processor, so that each small kernel counts; a
# full one shows what the arithmetic costs.
FIRST: list[Measured] = [
    ("beside LoRA, full batch", company.beside_lora, ("sd15", 64, 32), 35),
    ("beside LoRA, full batch", company.beside_lora, ("dit-xl/2", 32, 128), 30),
    ("training, full batch", speed.training_step, ("sd15", 64, 16), 30),
    ("training, full batch", speed.training_step, ("dit-xl/2", 32, 32), 30),
    ("beside LoRA", company.beside_lora, ("sd15", 64, 2), 20),
    ("beside LoRA", company.beside_lora, ("dit-xl/2", 32, 8), 15),
    ("training", speed.training_step, ("sd15", 64, 4), 30),
    ("training", speed.training_step, ("dit-xl/2", 32, 16), 30),
    ("forward", speed.forward_pass, ("sd15", 64, 2), 15),
    ("forward", speed.forward_pass, ("dit-xl/2", 32, 8), 15),
    ("compiled, modulating", _modulating, ("dit-xl/2", 32, 8), 60),
    ("blocks compiled first", speed.attached_to_blocks, ("flux", 128, 1), 60),
    ("compiled", speed.compiled_model, ("dit-xl/2", 32, 8), 60),
    ("forward", speed.forward_pass, ("flux", 128, 1), 30),
    ("forward", speed.forward_pass, ("sdxl", 128, 2), 20),
    ("beside LoRA", company.beside_lora, ("sdxl", 128, 2), 25),
    ("forward", speed.forward_pass, ("sd3", 128, 2), 20),
    ("offload", memory.group_offload, ("sd15", 64, 2), 15),
    ("offload", memory.group_offload, ("sd3", 128, 1), 20),
    ("casting", memory.layerwise_casting, ("sd15", 64, 2), 15),
    ("casting", memory.layerwise_casting, ("sd3", 128, 1), 20),
    ("blocks compiled", speed.compiled_blocks, ("flux", 64, 1), 60),
    ("beside LoRA", company.beside_lora, ("flux", 64, 1), 40),
    ("forward, one at a time", speed.forward_pass, ("dit-xl/2", 32, 1), 15),
    ("forward, one at a time", speed.forward_pass, ("sd15", 64, 1), 15),
    ("compiled", speed.compiled_model, ("sd15", 64, 2), 150),
]
QUANTISED = ("q4_0", "fp8-scaled", "nf4", "int8", "q8_0")


@dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Args:
        name: of the report, and for --only.
        part: 1 or 2.
        seconds: its budget on a current card; it does not start when less time is left.
        run: measures.
        smoke: whether it is one of the few that --smoke runs.
    """

    name: str
    part: int
    seconds: float
    run: Callable[[Part], None]
    smoke: bool = False


def stages_of(setup: Setup, out: Path) -> list[Stage]:
    """All stages: what a patch computes and costs, then what it is worth.

    Args:
        out: folder for what part 2 trains.
    """
    stages = [
        Stage(f"numbers {name}", 1, 5, partial(_named, numbers.numbers, setup, name), name == "dit")
        for name in FAMILIES
    ]
    stages.append(Stage("tests", 1, 60, partial(numbers.gpu_tests, setup)))
    ways = partial(kernels.modulation_kernels, setup)
    stages.append(Stage("ways to modulate", 1, 20, ways, smoke=True))
    tried: set[str] = set()
    for kind, function, which, seconds in FIRST:
        run = partial(_measured, function, setup, which)
        # Compiling takes seconds also with tiny models, whose batch stands for all.
        again = ("compiled", "one at a time", "full batch")
        quick = kind not in tried and not any(words in kind for words in again)
        stages.append(Stage(f"{kind} {which[0]}", 1, seconds, run, quick))
        tried.add(kind)
    for form in QUANTISED:
        run = partial(_quantised, setup, form)
        stages.append(Stage(f"quantised {form} sd15", 1, 25, run, form == "q4_0"))
    for name in FAMILIES:
        run = partial(_named, numbers.cuda_graph, setup, name)
        stages.append(Stage(f"graph {name}", 1, 5, run, name == "dit"))
    second = worth.stages(setup, out)
    stages += [Stage(name, 2, seconds, run, smoke) for name, seconds, run, smoke in second]
    return stages


def _named(function: Callable[..., None], setup: Setup, name: str, part: Part) -> None:
    function(setup, part, name)


def _measured(
    function: Callable[..., None], setup: Setup, which: tuple[str, int, int], part: Part
) -> None:
    function(setup, part, *which)


def _quantised(setup: Setup, form: str, part: Part) -> None:
    company.beside_lora(setup, part, "sd15", 64, 2, form)
