"""Patches in use: the settings do what they say, on the real digits base with few samples."""

import torch

from dmp_common import Patch
from tests.randomness import randomise
from training.base.frozen import load_frozen
from training.experiments.miniature import use as module
from training.experiments.miniature.subjects import digits
from training.experiments.miniature.use import SETTINGS, Use, UseSetting, table
from training.methods.full import FullMethod
from training.options.config import TrainConfig


def _patch():
    return randomise(Patch.create("digits", gate="none"), 0, std=0.02).eval()


def _use(monkeypatch, full=None):
    monkeypatch.setattr(module, "SEEDS", (0,))
    return Use(digits(), _patch(), full, samples=80)


def test_strength_schedule_and_sampler_change_what_is_drawn(monkeypatch):
    use = _use(monkeypatch)
    few = {"steps": 3}
    base, patched = use.distances(UseSetting(**few))
    again, off = use.distances(UseSetting(strength=0.0, **few))
    assert base == again == off != patched
    found = {
        use.distances(UseSetting(**few, **changes))[1][0]
        for changes in (
            {}, {"strength": 2.0}, {"last": 500.0}, {"first": 500.0}, {"sampler": "dpm++"},
            {"guidance": 2.0},
        )
    }  # fmt: skip
    assert len(found) == 6
    assert len(use.of_base) == 3  # drawn once for all strengths and schedules


def test_a_sibling_is_another_base(monkeypatch, tmp_path):
    frozen = load_frozen(TrainConfig(base="digits", method="full"))
    method = FullMethod(frozen, TrainConfig(base="digits", method="full"))
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.mul_(1.01)
    method.save(tmp_path / "full", {}, torch.float32)
    use = _use(monkeypatch, tmp_path / "full")
    setting = UseSetting(steps=3)
    sibling = UseSetting(steps=3, sibling=True)
    assert use.distances(setting)[0] != use.distances(sibling)[0]
    assert use.distances(sibling)[0] != use.distances(sibling)[1]


def test_the_table_has_a_row_a_setting(monkeypatch):
    use = _use(monkeypatch)
    small = {"strength": [("1", UseSetting(steps=2))], "sibling": SETTINGS["sibling"]}
    monkeypatch.setattr(module, "SETTINGS", small)
    lines = table(use).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| strength | 1 |")  # no sibling was given
