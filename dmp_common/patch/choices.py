"""The values that the options of a patch can have, as types and as data."""

from __future__ import annotations

from typing import Any, Literal, get_args

from dmp_common.bases.base import Prediction

GateKind = Literal["linear", "attention", "none"]
Selection = Literal["soft", "hard"]
GateUnit = Literal["prompt", "grid"]
GateForm = Literal["softmax", "residual"]
GridScope = Literal["patch", "site"]
AcrossDepth = Literal["distinct", "uniform"]
Mix = Literal["add", "prepend", "modulate"]
Condition = Literal["t", "t+y"]
Init = Literal["zero", "random"]
Expert = Literal["high", "low"]
GateInit = Literal["zero", "random", "stages"]

CHOICES: dict[str, tuple[str, ...]] = {
    "gate": get_args(GateKind),
    "selection": get_args(Selection),
    "gate_unit": get_args(GateUnit),
    "gate_form": get_args(GateForm),
    "grid_scope": get_args(GridScope),
    "across_depth": get_args(AcrossDepth),
    "mix": get_args(Mix),
    "condition": get_args(Condition),
    "prompt_init": get_args(Init),
    "gate_init": get_args(GateInit),
    "prediction": get_args(Prediction),
}
# Entries that the format got after its first release, with the paper's choices. A file without such
# an entry, whether older or not, means the paper's choice.
LATER: dict[str, Any] = {
    "gate_unit": "prompt",
    "gate_form": "softmax",
    "grid_scope": "patch",
    "timesteps": [0, 1000],
    "guidance": None,
    "expert": None,
}
# What `gate_init="stages"` needs: each grid as a whole starts with its own part of the schedule.
STAGED = {"gate": "linear", "gate_unit": "grid", "gate_form": "residual", "condition": "t"}
