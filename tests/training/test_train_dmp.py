"""The command itself, as a new user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmp_common import Patch
from training.options.command_line import parse_arguments
from training.train_dmp import main

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ["--base", "digits", "--recipe", "repair", "--student_quantization", "rtn3"]
SHORT = [
    "--base", "digits", "--max_train_steps", "3", "--validate_every_n_steps", "3",
    "--train_batch_size", "16", "--max_validation_images", "32", "--validation_draws", "1",
    "--no-relative_loss",
]  # fmt: skip


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_quickstart_leaves_everything_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another folder, so that nothing depends on where it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.objective.relative.IMAGES", 32)
    monkeypatch.setattr("training.run.repair_report._STRIP", 3)
    monkeypatch.setattr("training.run.repair_report._STEPS", 4)
    line = [*QUICKSTART, "--max_train_steps", "12", "--validate_every_n_steps", "12"]
    line += ["--max_validation_images", "32", "--validation_bins", "2", "--report_samples", "20"]
    line += ["--train_batch_size", "16"]
    assert main([*line, "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "digits-dmp.safetensors", "digits-dmp-gate.png", "digits-dmp.toml", "digits-dmp.json",
        "report.json", "report.md", "samples.png",
    }  # fmt: skip
    patch = Patch.load(out / "digits-dmp.safetensors")
    assert patch.variant.mix == "modulate"
    assert "ss_network_module" not in patch.metadata
    report = json.loads((out / "report.json").read_text())
    assert report["pictures"] == 20
    assert 0 < report["distance_after"] < report["distance_before"]
    gone = report["share_gone"]
    assert gone["low"] < gone["mean"] < gone["high"]
    assert gone["mean"] == pytest.approx(1 - report["distance_after"] / report["distance_before"])
    assert report["patch_bytes"] == (out / "digits-dmp.safetensors").stat().st_size
    told = (out / "report.md").read_text()
    assert f"{report['patch_bytes']:,} bytes" in told and "Now your model." in told
    # The first line comes before torch; the last lines have a verdict, and lines that run.
    signs = ("loading torch", "recipe: repair", "data: digits", "pictures: 20", "verdict: ",
             "To use it:", "Now your model.")  # fmt: skip
    places = [printed.index(sign) for sign in signs]
    assert places == sorted(places) and printed.startswith(signs[0])
    use = printed[places[-2] : places[-1]].splitlines()
    exec(compile("\n".join(x[4:] for x in use if x.startswith("    ")), "lines", "exec"), {})
    # The commands for one's own model are complete: only paths are missing.
    own = [x.split() for x in printed[places[-1] :].splitlines() if "python training/" in x]
    recipes = [parse_arguments(command[2:]).recipe for command in own]
    assert recipes == ["repair", "guidance"]


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = str(ROOT / "training" / "train_dmp.py")
    done = call([*launch, script, *SHORT, "--output_dir", "out", "--report_samples", "0"], tmp_path)
    assert done.returncode == 0, done.stderr
    Patch.load(tmp_path / "out" / "digits-dmp.safetensors")


def test_script_hides_no_other_package(tmp_path: Path) -> None:
    """Its folder holds `config` and `data`, which must not become top-level modules."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'training')!r}); "
        f"runpy.run_path({str(ROOT / 'training' / 'train_dmp.py')!r}); "
        f"assert {str(ROOT / 'training')!r} not in sys.path; import config"
    )
    done = call(["-c", code], tmp_path)
    assert "No module named 'config'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dmp_sites", "block.99"], "block.99"),
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--resume", "latest"], "found none: begin without --resume"),
        (["--resume", "nowhere"], "expected the state of a run at nowhere"),
        (["--optimizer_type", "Quantum"], "expected one of the optimisers AdamW"),
        (["--optimizer_args", "betas"], "expected --optimizer_args as name=value"),
        (["--optimizer_args", "quantum=1"], "expected arguments that AdamW takes"),
        (["--min_snr_gamma", "5", "--text_conditional", "--train_data_dir", "."], "--method full"),
        (["--huggingface_repo_id", "a/b", "--method", "full"], "expected --huggingface_repo_id"),
        (["--base", "sd99", "--dataset_name", "digits"], "known bases"),
        (["--pretrained_model_name_or_path", "nowhere"], "--pretrained_model_name_or_path"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = [] if "--base" in arguments else ["--base", "digits"]
    assert main(["--output_dir", str(tmp_path / "out"), *base, *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_unwritable_folder_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*SHORT, "--output_dir", str(tmp_path / "file")]) == 1
    assert "change --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["sd15", "dit-b/2", "flux"])
def test_bare_command_without_data_shows_three_that_run(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--base", base, "--output_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "expected data to train on" in printed
    commands = [line.split() for line in printed.splitlines() if "python training/" in line]
    assert len(commands) == 3
    for command in commands:  # they are complete: only paths are missing
        config = parse_arguments([part.strip('"') for part in command[2:]])
        assert config.base == base
