"""`python -m benchmarks.gpu`, tried on the CPU with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import numbers
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.report import Part, Report


def report_of(folder: Path, *parts: str, minutes: float = 60.0) -> tuple[int, dict, str]:
    """Exit code and both files of a tiny run."""
    common = ["--device", "cpu", "--tiny", "--out", str(folder), "--minutes", str(minutes)]
    code = main([*common, "--only", *parts])
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return code, data, (folder / "report.md").read_text(encoding="utf-8")


def test_parts_measure_and_keep_their_promises(tmp_path):
    names = ["numbers dit", "forward dit-xl/2", "casting sd3", "offload sd3"]
    code, data, text = report_of(tmp_path, *names)
    assert {part["name"] for part in data["parts"]} == set(names)
    assert all(part["failure"] is None and part["figures"] for part in data["parts"])
    assert code == 0, text
    figures = {f["what"]: f for part in data["parts"] for f in part["figures"]}
    assert figures["strength 0 is the base bit for bit"]["value"] is True
    assert 0.01 < figures["change by the patch"]["value"] < 10.0
    assert figures["patched / plain forward, hits"]["value"] > 0.0
    assert data["about"]["torch"] in text
    assert "| numbers dit | strength 0 is the base bit for bit | yes |" in text


def test_training_part_measures_time_and_memory_saved_for_backward(tmp_path):
    code, data, text = report_of(tmp_path, "training dit-xl/2")
    assert code == 0, text
    values = {f["what"]: f["value"] for f in data["parts"][0]["figures"]}
    assert 1.0 <= values["saved for backward, patch / floor"] < 1.05
    assert values["training step, patch / LoRA r=16"] > 0.0


def test_a_failed_part_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("the | card burns")

    monkeypatch.setattr(numbers, "soft_patch", fail)
    code, data, text = report_of(tmp_path, "numbers dit", "forward dit-xl/2")
    assert code == 1
    first, second = data["parts"]
    assert "the | card burns" in first["failure"]
    assert second["failure"] is None
    assert "Failed: numbers dit." in text
    assert "RuntimeError: the | card burns" in text


def test_a_broken_promise_is_named(tmp_path):
    report = Report(tmp_path, "cpu")
    report.run("a", lambda part: part.add("ratio", 1.5, most=1.02))
    report.run("b", lambda part: part.hold("equal", False))
    assert "Not good: a: ratio; b: equal." in report.markdown()


def test_no_part_starts_without_time(tmp_path):
    code, data, text = report_of(tmp_path, "numbers dit", minutes=0.0)
    assert code == 0
    assert data["parts"] == []
    assert data["left_out"] == ["numbers dit"]
    assert "Did not run: numbers dit." in text


def test_an_interrupt_ends_the_run():
    with pytest.raises(KeyboardInterrupt), Part("a"):
        raise KeyboardInterrupt
