"""A killed run goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dmp_common import PatchError
from tests.training.conftest import Go, Start, patch_of
from training.data.indexed import IndexedData
from training.run import metadata
from training.run.loop import train as run_training
from training.run.resuming import restore
from training.run.state import find_states, load_state, save_state, state_folder
from training.run.trainer import Trainer
from training.train_dmp import main

ROOT = Path(__file__).resolve().parents[3]
OWN = "tiny-digits-dmp"
STATE = {"save_state": True, "save_every_n_steps": 2, "max_train_steps": 6}
OPTIONS = {
    "AdamW": {"lr_scheduler": "cosine", "load_weight": 0.1, "importance_weight": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "validate_every_n_steps": 3,
                    "keep_best": True},
    "SGDNesterov": {"optimizer_type": "SGDNesterov", "ema_decay": 0.0},
    "Adafactor": {"optimizer_type": "Adafactor", "lr_warmup_steps": 3},
    "lora": {"method": "lora", "network_dim": 2},
    "two-sided": {"objective": "two-sided", "own_samples": 32, "own_steps": 2},
    "full": {"method": "full", "learning_rate": 1e-4},
    "joint": {"method": "joint", "learning_rate": 1e-4, "load_weight": 0.1, "gate_noise": True},
    "guided": {"objective": "distill", "teacher_guidance_scale": "1:3",
               "caption_dropout_rate": 0.0},
    "stored": {"objective": "distill", "student_quantization": "rtn2", "mix": "modulate",
               "cache_teacher": True, "teacher_draws": 1, "choose_strength": True},
    "states": {"objective": "distill", "student_quantization": "rtn2", "states": "student",
               "trajectories": 16, "state_steps": 2, "teacher_weighting": "gap"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_continuation_equals_the_uninterrupted_run(
    name: str, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = {**STATE, **OPTIONS[name]}
    _, events = go(**options)
    whole = read_all(events.outputs.folder)
    # What a kill between steps 4 and 6 leaves: the states up to 4, and half of one.
    for path in events.outputs.folder.iterdir():
        if "step00000002" not in path.name and "step00000004" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    own = events.outputs.path().stem if events.outputs.path().suffix else events.outputs.path().name
    half = events.outputs.folder / f".{own}-step00000006-state.tmp"
    half.mkdir()
    (half / "values.safetensors").write_bytes(b"half")
    run, events = go(**options, resume="latest")
    assert run.step == 6
    again = read_all(events.outputs.folder)
    assert set(again) == set(whole)
    for file, data in whole.items():
        assert data == again[file], file


def read_all(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes; torch's own container of the optimiser is compared by values."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "rest.pt":
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def test_state_holds_optimiser_schedule_and_average(start: Start, go: Go) -> None:
    first, events = go(**STATE, lr_scheduler="cosine")
    folder = find_states(events.outputs.folder, OWN)[6]
    second, _ = start(**STATE, lr_scheduler="cosine", seed=0)
    second.method.remove()
    restore(second, load_state(folder))
    for group in ("state", "param_groups"):
        assert_same(
            first.optimiser.optimizer.state_dict()[group],
            second.optimiser.optimizer.state_dict()[group],
        )
    assert first.schedule.state_dict() == second.schedule.state_dict()
    assert_same(first.average.state_dict(), second.average.state_dict())
    assert first.position == second.position


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_another_run_is_not_continued(go: Go, start: Start) -> None:
    go(save_state=True, max_train_steps=2, output_name=OWN)
    changes: list[tuple[dict[str, object], str]] = [
        ({"seed": 5}, "seed 0 (now 5)"),
        ({"train_batch_size": 8}, "images of a step 16 (now 8)"),
        ({"optimizer_type": "Adafactor"}, "optimizer_type 'AdamW' (now 'Adafactor')"),
        ({"across_depth": "uniform"}, "variant"),
        ({"max_train_steps": 1}, "raise --max_train_steps"),
        ({"min_snr_gamma": 5.0}, "--min_snr_gamma None (now 5.0)"),
        ({"caption_dropout_rate": 0.5}, "--caption_dropout_rate 0.1 (now 0.5)"),
        ({"ema_decay": 0.5}, "--ema_decay 0.99 (now 0.5)"),
    ]
    for changed, message in changes:
        options = {"max_train_steps": 4, **changed}
        with pytest.raises(PatchError) as caught:
            start(resume="latest", output_name=OWN, **options)
        assert message in str(caught.value)


def test_damaged_states_are_refused(go: Go) -> None:
    _, events = go(save_state=True, max_train_steps=2)
    folder = state_folder(events.outputs.folder, OWN, 2)
    rest = folder / "rest.pt"
    data = rest.read_bytes()
    for broken in (data[:100], b"", b"cos\nsystem\n(S'echo'\ntR."):
        rest.write_bytes(broken)
        with pytest.raises(PatchError, match="found none that is whole"):
            load_state(folder)
    rest.write_bytes(data)
    load_state(folder)


def test_saving_a_state_never_loses_the_old_one(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    run, events = go(save_state=True, max_train_steps=2)
    folder = state_folder(events.outputs.folder, OWN, 2)
    state = load_state(folder)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.run.state.torch.save", full)
    with pytest.raises(PatchError, match=r"expected [\d.]+ MiB free in .* the disk is full"):
        save_state(folder, state)
    assert load_state(folder).step == run.step
    assert not list(folder.parent.glob(".*.tmp"))


@pytest.mark.slow
def test_killed_process_is_continued_byte_by_byte(
    digits_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, ended without warning in the middle of its steps."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(metadata, "git_revision", lambda folder: None)
    options = [
        "--base", "tiny-digits", "--pretrained_model_name_or_path", str(digits_base),
        "--dataset_name", "digits", "--train_batch_size", "16", "--save_state",
        "--save_every_n_steps", "2", "--save_last_n_steps", "4", "--max_train_steps", "60",
        "--max_validation_images", "16", "--keep_best", "--output_dir", "out", "--cpu",
    ]  # fmt: skip
    results = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        if name == "killed":
            kill_after_some_states(options, folder / "out")
            assert not (folder / "out" / f"{OWN}.safetensors").exists()
        assert main([*options, *(["--resume", "latest"] if name == "killed" else [])]) == 0
        results[name] = read_all(folder / "out")
    assert set(results["whole"]) == set(results["killed"])
    for file, data in results["whole"].items():
        assert data == results["killed"][file], file


def kill_after_some_states(options: list[str], out: Path) -> None:
    """Starts the trainer in a process of its own and ends it once it has saved."""
    code = (
        "import sys; from tests.training import conftest; from training.run import metadata; "
        "from training.train_dmp import main; metadata.git_revision = lambda folder: None; "
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(find_states(out, OWN)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode != 0


def test_a_run_killed_before_its_result_is_finished(
    go: Go, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps were done and saved as a state; the file was not written."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = {"save_state": True, "validate_every_n_steps": 1, "keep_best": True}
    _, events = go(**options)
    path = events.outputs.path()
    whole = path.read_bytes()
    path.unlink()
    run, events = start(**options, resume="latest")
    assert run.step == run.total
    Trainer(run, events).train()
    Trainer(run, events).finish()
    assert path.read_bytes() == whole


def test_a_learning_rate_changed_on_resume_is_used_and_recorded(
    go: Go, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"save_state": True, "lr_scheduler": "cosine", "max_train_steps": 4}
    _, events = go(**options, save_every_n_steps=2)
    folder = find_states(events.outputs.folder, OWN)[2]
    run, _ = start(**options, resume=str(folder))
    before = [group["lr"] for group in run.optimiser.param_groups]
    run.method.remove()
    run, events = start(**options, resume=str(folder), learning_rate=5e-3, gate_lr_factor=2.0)
    assert "from here on --learning_rate is 0.005 (it was 0.001)" in capsys.readouterr().out
    now = [group["lr"] for group in run.optimiser.param_groups]
    assert now == pytest.approx([5 * before[0], 10 * before[1]])
    run_training(run, events)
    run.method.remove()
    assert run.schedule.base_lrs == [5e-3, 1e-2]
    assert events.metadata.fixed["ss_learning_rate"] == "0.005"


def test_another_base_and_other_data_are_not_continued(
    go: Go, start: Start, digits_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same number of images, and of the same shape."""
    go(save_state=True, max_train_steps=2)
    other = tmp_path / "other"
    shutil.copytree(digits_base, other)
    model = DiTTransformer2DModel.from_pretrained(other / "transformer")
    torch.nn.init.normal_(model.proj_out_2.weight)
    model.save_pretrained(other / "transformer")
    with pytest.raises(PatchError, match="other base weights"):
        start(resume="latest", pretrained_model_name_or_path=str(other))
    monkeypatch.setattr(IndexedData, "fingerprint", lambda data: "other")
    with pytest.raises(PatchError, match="found one with other data"):
        start(resume="latest")


def test_a_base_that_was_moved_is_the_same(
    go: Go, start: Start, digits_base: Path, tmp_path: Path
) -> None:
    go(save_state=True, max_train_steps=2)
    shutil.copytree(digits_base, tmp_path / "moved")
    run, _ = start(resume="latest", pretrained_model_name_or_path=str(tmp_path / "moved"))
    run.method.remove()
    assert run.step == 2


def test_patch_after_resume_is_that_of_the_run(go: Go) -> None:
    whole, _ = go(max_train_steps=4)
    go(max_train_steps=2, save_state=True)
    rest, _ = go(max_train_steps=4, resume="latest")
    for name, tensor in patch_of(whole).tensors().items():
        assert torch.equal(tensor, patch_of(rest).tensors()[name])
