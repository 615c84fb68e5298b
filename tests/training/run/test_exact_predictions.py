"""Exact predictions on disk: of noised data and of trajectories, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmp_common import PatchError
from tests.training.conftest import Folders, Go, Start, Train
from training.base.frozen import load_frozen
from training.objective.stored_aims import StoredData
from training.objective.trajectories import Trajectories
from training.run import filling, loop

ROUNDED = {
    "objective": "distill", "student_quantization": "rtn2", "recipe": "none", "mix": "modulate",
}  # fmt: skip
STORED = {**ROUNDED, "cache_teacher": True, "teacher_draws": 2, "train_batch_size": 128}
TRAJECTORIES = {**ROUNDED, "states": "teacher", "trajectories": 32, "state_steps": 3}


def stored(output: Path) -> Path:
    (folder,) = output.glob("exact-predictions-*")
    return folder


def test_stored_predictions_are_those_of_the_exact_base(start: Start) -> None:
    run, _ = start(**STORED)
    run.method.remove()
    assert isinstance(run.data, StoredData) and run.exact is None
    # Nine batches of 128 an epoch, the last of them filled up, twice.
    assert run.data.size == 2 * 9 * 128
    exact = load_frozen(run.config)
    batch = next(loop._batches(run))
    aim = run.aims.aim(batch, [])
    with torch.no_grad():
        told = exact.family.predict(exact.model, aim.noisy, aim.t, aim.given)
    torch.testing.assert_close(aim.target, told)
    assert len(set(aim.t.tolist())) > 8
    assert 0 < (aim.given["labels"] == 10).float().mean() < 0.5  # dropped classes


def test_a_store_serves_every_cheap_call(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    go(**STORED)
    monkeypatch.setattr(filling.Filling, "aims", None)  # nothing is computed again
    _, events = go(**{**STORED, "student_quantization": "rtn3", "method": "lora"}, seed=0)
    assert events.verdict is not None
    use = json.loads(events.outputs.path().with_suffix(".json").read_text())["use"]
    assert use["states"] == "data" and use["cheap"]["quantization"] == "rtn3"


def test_a_killed_filling_goes_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_COMMIT_EVERY", 2)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    options = {**STORED, "teacher_draws": 1}
    compute, calls = filling.Filling.aims, []

    def killed(self: filling.Filling, *given: object) -> object:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(filling.Filling, "aims", killed)
        with pytest.raises(KeyboardInterrupt):
            start(**options, output_dir=str(tmp_path / "killed"))
    for name in ("killed", "whole"):
        start(**options, output_dir=str(tmp_path / name))[0].method.remove()
    one, other = (stored(tmp_path / name) for name in ("killed", "whole"))
    assert one.name == other.name
    for path in other.rglob("*.rows"):
        assert path.read_bytes() == (one / path.relative_to(other)).read_bytes(), path.name


@pytest.mark.parametrize("states", ["teacher", "student"])
def test_states_are_those_a_sampler_passes(start: Start, states: str) -> None:
    run, _ = start(**{**TRAJECTORIES, "states": states}, state_guidance_scale=2.0)
    run.method.remove()
    exact = load_frozen(run.config)
    batch = next(run.data.batches(global_batch=run.data.size))
    aim = run.aims.aim(batch, [])
    # Two batches of 16, each in three to six steps from the noise on.
    assert 2 * 3 * 16 <= run.data.size <= 2 * 6 * 16
    steps = aim.t.unique(return_counts=True)[1]
    assert int(steps.min()) >= 16
    with torch.no_grad():
        told = exact.family.predict(exact.model, aim.noisy, aim.t, aim.given)
    torch.testing.assert_close(aim.target, told)  # without guidance, which only leads the way


def test_sides_of_a_trajectory_end_where_the_sampler_does(start: Start) -> None:
    """The walk of the exact call is the usual sampling with guidance."""
    from training.data.sources.caption_lines import CaptionData
    from training.objective.sampling import draw_images

    run, _ = start(**ROUNDED)
    run.method.remove()
    config = run.config.model_copy(update={"state_steps": 4, "state_guidance_scale": 3.0})
    teacher = run.teacher()
    walk = Trajectories(run.exact, teacher, run.encoders, config, run.device)
    data = CaptionData(["3", "7"], run.frozen.kind, (8, 8), 0, 0.0, False, "")
    batch, names = next(data.batches(global_batch=2)), [("x", 0), ("x", 1)]
    passed = []
    found = walk.pictures(batch, names, passed)
    untold = {"labels": torch.tensor([10, 10])}
    noise = passed[0].noisy
    wanted = draw_images(
        run.exact, noise, {"labels": batch.labels}, untold, steps=len(passed), scale=3.0
    )
    torch.testing.assert_close(found.clamp(-1, 1), wanted)


@pytest.mark.parametrize("name", ["sd15", "dit", "flux"])
def test_every_family_distils_captions_alone(train: Train, name: str, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("0\n2\n" if name == "dit" else "a red cat\na dog\n", encoding="utf-8")
    out = train(
        name, "--objective", "distill", "--student_quantization", "rtn2", "--mix", "modulate",
        "--states", "teacher", "--state_captions", str(captions), "--trajectories", "2",
        "--state_steps", "1", "--train_batch_size", "2", "--max_train_steps", "1",
        "--validation_bins", "1", "--max_validation_images", "2", data="",
    )  # fmt: skip
    (result,) = [path for path in out.glob("*.json") if path.is_file()]
    told = json.loads(result.read_text(encoding="utf-8"))
    assert told["verdict"]["images"] == 2
    assert told["use"]["states"] == "teacher"
    assert set(told["verdict"]["share_repaired_by_side"]) == {
        "conditional", "unconditional", "difference"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_pictures_with_captions_and_guidance(train: Train, name: str) -> None:
    out = train(
        name, "--objective", "distill", "--teacher_guidance_scale", "1:4", "--cache_teacher",
        "--teacher_draws", "1", "--caption_dropout_rate", "0", "--negative_prompt", "a dog",
        "--mixed_precision", "bf16",
    )  # fmt: skip
    index = json.loads((next(stored(out).iterdir()) / "index.json").read_text())
    (group,) = index["groups"].values()
    assert group["noisy"]["dtype"] == "float16" and "strengths" in group
    assert index["facts"]["options"]["negative_prompt"] == "a dog"


def test_the_dry_run_says_the_disk_space(
    train: Train, capsys: pytest.CaptureFixture[str], folders: Folders
) -> None:
    options = ["--objective", "distill", "--student_quantization", "rtn2", "--mix", "modulate"]
    out = train("dit", *options, "--cache_teacher", "--dry_run")
    assert "exact predictions on disk: about 0.00 GiB in" in capsys.readouterr().out
    assert not list(out.glob("exact-*"))


def test_the_cheap_model_of_a_file_is_loaded_when_the_exact_one_has_gone(
    train: Train, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from tests.training import tinyfiles, tinyggufs
    from training.run import teaching

    tensors = tinyfiles.weights_of(folders("dit") / "transformer")
    path = tinyggufs.write_gguf(tmp_path / "student.gguf", tensors)
    cheap, seen = teaching.cheap_base, []

    def noted(frozen: object, *given: object) -> object:
        seen.append({p.device.type for p in frozen.model.parameters()})
        return cheap(frozen, *given)

    monkeypatch.setattr(teaching, "cheap_base", noted)
    options = ["--objective", "distill", "--mix", "modulate", "--student_weights", str(path)]
    train("dit", *options, "--cache_teacher", "--teacher_draws", "1")
    assert seen == [{"meta"}]


def test_lines_that_are_no_classes_are_told(start: Start, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("3\n10\ncat\n", encoding="utf-8")
    with pytest.raises(PatchError, match=r"expected class ids below 10, found 10, cat"):
        start(**TRAJECTORIES, state_captions=str(captions))
    with pytest.raises(PatchError, match="a text file for --state_captions, found none"):
        start(**TRAJECTORIES, state_captions=str(tmp_path / "none.txt"))
