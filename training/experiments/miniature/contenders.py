"""What a study compares: methods with what is tuned of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.options import presets

_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Setting:
    """The options that are tuned.

    Args:
        rate: learning rate.
        relative: whether with the relative loss; the plain one otherwise.
    """

    rate: float
    relative: bool

    @property
    def name(self) -> str:
        """The name of the setting's folder."""
        return f"{self.rate:g}" if self.relative else f"{self.rate:g}-plain"

    @property
    def options(self) -> dict[str, Any]:
        """The trainer's options of this setting."""
        return {"learning_rate": self.rate} | ({"relative_loss": True} if self.relative else {})


@dataclass(frozen=True)
class Contender:
    """A method with everything but what is tuned, and the seed.

    Args:
        options: the trainer's.
        rates: learning rates to choose from, as many for each contender.
        objectives: relative loss (True) and plain loss (False), to choose from.
    """

    options: Mapping[str, Any]
    rates: tuple[float, ...] = _RATES
    objectives: tuple[bool, ...] = (True, False)

    @property
    def settings(self) -> list[Setting]:
        """All settings to choose from."""
        return [Setting(rate, relative) for relative in self.objectives for rate in self.rates]


CONTENDERS: dict[str, Contender] = {
    # Naive prompt tuning, eq. 2.
    "prompt": Contender({"method": "prompt"}),
    # The same on the mixture's coarser grid: is it the gate, or are there just fewer values?
    "prompt-coarse": Contender({"method": "prompt"}),
    # The paper's method with its losses, and its gate without balancing.
    "dmp-paper": Contender(
        {"method": "dmp", "importance_weight": 1.0, "load_weight": 1.0, "gate_lr_factor": 10.0},
        objectives=(False,),
    ),
    "dmp-gate": Contender({"method": "dmp", "gate_lr_factor": 10.0}),
    # Ours: as many prompts on coarser grids, each with a part of the noise levels; the recipe as it
    # is, and with the objective tuned as that of the others.
    "stages": Contender({"method": "dmp", **presets.STAGES}, objectives=(True,)),
    "mixture": Contender({"method": "dmp", **presets.STAGES}),
    # Ours with an off switch: nothing in the noisy half, neither in training nor in use.
    "stages-half": Contender({"method": "dmp", **presets.CLEAN}),
    # The same switch for the controls: is it the gate, or the half?
    "prompt-half": Contender({"method": "prompt", "max_timestep": 500}),
    "lora-half": Contender({"method": "lora", "max_timestep": 500}),
    # The paper's places, each free to be off, negative or strong.
    "residual": Contender({"method": "dmp", "gate_form": "residual", "gate_init": "random"}),
    "lora": Contender({"method": "lora"}),
    "full": Contender({"method": "full"}, (1e-5, 3e-5, 1e-4)),
}


def ablations() -> dict[str, dict[str, Any]]:
    """The paper's Table 4 in miniature: one choice changed at a time, from its own default."""
    return {
        "none": {"method": "prompt"},
        "linear": {},
        "attention": {"gate": "attention"},
        "hard": {"selection": "hard"},
        "uniform": {"across_depth": "uniform"},
        "prepend": {"mix": "prepend"},
        "first half": {"dmp_depth": 3},
        "t+y": {"condition": "t+y"},
        "random prompts": {"prompt_init": "random"},
        "no balancing": {"importance_weight": 0.0, "load_weight": 0.0},
        "importance alone": {"load_weight": 0.0},
        "load alone": {"importance_weight": 0.0},
    }
