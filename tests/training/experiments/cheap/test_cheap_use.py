"""A repair patch in use: what the table's rows compare."""

from pathlib import Path

import torch

from dmp_common import Patch
from training.experiments.cheap.cheap_trial import CheapTrial
from training.experiments.cheap.cheap_use import RepairInUse


def share_gone(row: str) -> float:
    return float(row.split("|")[4].split("%")[0])


def test_rows_compare_with_the_full_model():
    cheap = CheapTrial("digits", None, Path())
    exact, rounded = cheap.models(cheap.open(), "rtn3")
    used = RepairInUse(exact, rounded, torch.tensor([0, 7]))
    nothing = Patch.create("digits", mix="modulate")
    wrong = Patch.create("digits", mix="modulate")
    with torch.no_grad():
        wrong.modulation.prompts.fill_(0.5)
        assert share_gone(used.row("nothing", [(nothing, 1.0)], steps=2)) == 0.0
        # The full model with a patch that changes nothing is the full model.
        assert share_gone(used.row("full", [(nothing, 1.0)], "exact", steps=2)) == 100.0
        assert share_gone(used.row("wrong", [(wrong, 1.0)], steps=2)) < 0.0
        # Two calls are the target, one call is what is patched: rounded, it is not there.
        guided = used.row("guided", [(nothing, 1.0)], "exact", scale=2.0, called=1.0, steps=2)
        assert 0.0 < share_gone(guided) < 100.0
