"""`python -m benchmarks.gpu`, tried on the CPU with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import numbers, picturebase, worth
from benchmarks.gpu import report as report_module
from benchmarks.gpu.__main__ import chosen, main, parsed
from benchmarks.gpu.report import Part, Report
from benchmarks.gpu.stages import stages_of
from benchmarks.gpu.subjects import Setup
from dmp_common import Patch


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


def test_smoke_runs_a_few_stages_of_each_part(tmp_path):
    options = parsed(["--smoke", "--part", "1", "--out", str(tmp_path)])
    assert (options.device, options.minutes) == ("cpu", 7.0)
    stages = stages_of(Setup("cpu", True, lambda: 1.0), tmp_path)
    assert len({stage.name for stage in stages}) == len(stages)
    first = [stage.name for stage in stages if chosen(stage, options)]
    assert {"numbers dit", "beside LoRA sd15", "quantised q4_0 sd15", "graph dit"} <= set(first)
    assert len(first) < 15
    assert not any("compiled" in name or name == "tests" for name in first)


def test_no_stage_starts_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report_module, "machine_of", lambda device: "a card")
    asked = ["--device", "cuda", "--out", str(tmp_path), "--minutes", "0.04", "--only", "compiled"]
    assert main(asked) == 0
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["parts"] == []
    assert set(data["left_out"]) == {
        "compiled dit-xl/2", "compiled, modulating dit-xl/2", "compiled sd15",
    }  # fmt: skip


def test_every_file_with_tests_for_a_gpu_is_run():
    root = Path(__file__).parent
    marked = {
        path.relative_to(root.parent).as_posix()
        for path in root.rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }
    assert marked == set(numbers.TESTS)


def test_patches_are_measured_beside_lora_on_exact_and_quantised_weights(tmp_path):
    code, data, text = report_of(tmp_path, "beside LoRA dit", "quantised fp8")
    assert code == 0, text
    for part in data["parts"]:
        values = {f["what"]: f["value"] for f in part["figures"]}
        assert values["remove() gives the base bit for bit"] is True
        assert all(values[f"forward, {n} / plain"] > 0.0 for n in ("add", "modulate", "LoRA"))
    assert data["parts"][1]["figures"][0]["value"] > 1e-4  # the weights are rounded


def test_part_2_trains_a_base_and_what_repairs_it(tmp_path):
    code, data, text = report_of(tmp_path, "base", "repair rtn3-group32")
    assert code == 0, text
    base, repair = data["parts"]
    figures = {f["what"]: f["value"] for f in repair["figures"]}
    assert figures["rtn3-group32: distance of the cheap call's pictures"] > 0.0
    for remedy in worth.REMEDIES:
        assert figures[f"rtn3-group32: gone with {remedy}"] < 1.0
    assert base["figures"][-1]["what"] == "held-out loss of the base"
    # A base that is there is used: --base, or an earlier run in the same folder.
    carried = ["--base", str(tmp_path / "pictures/base"), "--smoke", "--out", str(tmp_path / "2")]
    assert main([*carried, "--only", "base"]) == 0
    assert not (tmp_path / "2/pictures/base").exists()


def test_part_2_fits_into_seven_minutes(tmp_path):
    stages = stages_of(Setup("cuda", False, lambda: 1.0, data=tmp_path), tmp_path)
    assert sum(stage.seconds for stage in stages if stage.part == 2) <= 420.0


def test_lora_of_part_2_has_about_as_many_values_as_the_patch():
    with torch.device("meta"):
        patch = Patch.create(picturebase.registered(picturebase.RECIPE), mix="modulate")
    each = 8 * 4 * 2 * 256  # blocks, projections, both matrices, width: of one rank
    rank = round(patch.saved_parameters / each)
    assert abs(rank * each - patch.saved_parameters) < 0.06 * patch.saved_parameters
