"""The report of a run on the digits base."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dmp_common import Patch
from training.base.frozen import load_frozen
from training.options.command_line import resolve
from training.run.digits_report import write_digits_report

HISTORY = SimpleNamespace(
    base_mean=2.0, best_step=1, validation={0: None, 1: None}, mean=lambda step: 2.0 - step
)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_patch_for_guidance_is_compared_with_guidance(guidance, tmp_path, monkeypatch):
    for name, value in (("_STEPS", 2), ("_DRAWS", 1), ("BINS", 2)):
        monkeypatch.setattr(f"training.run.digits_report.{name}", value)
    config = resolve({"base": "digits", "report_samples": 20})
    frozen = load_frozen(config)
    scales = []
    samples = "training.run.digits_report.labelled_samples"
    real = write_digits_report.__globals__["labelled_samples"]
    monkeypatch.setattr(samples, lambda *a, **k: scales.append(k["scale"]) or real(*a, **k))
    patch = Patch.create("digits", guidance=guidance)
    write_digits_report(config, frozen, patch, HISTORY, tmp_path)
    told = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert scales == [guidance or 1.0, 1.0]
    assert ("| | two calls | the patch | change |" in told) == (guidance is not None)
    assert ("\n| denoising loss |" in told) == (guidance is None)
    distances = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    base, patched = (distances[key]["frechet_distance"] for key in ("base", "patched"))
    assert (base == patched) == (guidance is None)  # a patch of zeros draws as one call does
