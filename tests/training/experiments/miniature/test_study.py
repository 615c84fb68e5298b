"""A whole study in small: the real trainer on the real digits, few steps."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from training.experiments.miniature import study as module
from training.experiments.miniature import study_jobs, subjects
from training.experiments.miniature.contenders import CONTENDERS, Setting, ablations
from training.experiments.miniature.study import ablate, confirm, plot, strengths, tune
from training.experiments.miniature.study_jobs import LATE, Job, MissingError, Study, do
from training.experiments.miniature.study_tables import (
    bins_table,
    confirmation_table,
    difference_table,
)
from training.experiments.miniature.trial import TrialMeasures
from training.options import presets


def _measures(value, frechet=1.0, images=4):
    losses = torch.full((images, 2), value, dtype=torch.float64)
    return TrialMeasures(losses, {"unipc": frechet, "ddim": 2 * frechet})


def _rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables_say_changes_and_intervals():
    base = _measures(0.2, 5.0)
    ours = [_measures(0.18 + 0.001 * n, 4.0 + 0.1 * n) for n in range(3)]
    other = [_measures(0.19, 4.5)] * 3
    found = {"stages": ours, "prompt": other}
    rows = _rows(confirmation_table(base, found))
    assert rows[2] == ["base", "0.20000", "0", "5.000", "10.000"]
    assert rows[3] == [
        "stages", "-9.5000 % +- 0.5000", "-9.5000 % +- 0.5000", "4.100 +- 0.100", "8.200 +- 0.200",
    ]  # fmt: skip
    assert rows[4][1].startswith("-5.0000 % +- 0.0000")
    rows = _rows(difference_table(base, found, "stages"))
    assert rows[2][:2] == ["base", "-9.5000 [-10.7421, -8.2579]"]
    # -4.5 per cent, and the t interval of three values 0.5 apart: 4.303 * 0.5 / sqrt(3)
    assert rows[3][:2] == ["prompt", "-4.5000 [-5.7421, -3.2579]"]
    assert rows[3][3:] == ["-0.400 [-0.648, -0.152]", "-0.800 [-1.297, -0.303]"]
    bins = bins_table(base, {"stages": ours})
    assert "| stages | -9.500 | -9.500 |" in bins


def test_relative_loss_counts_every_bin_alike():
    base = TrialMeasures(torch.tensor([[1.0, 0.01], [3.0, 0.03]]).double(), {})
    other = TrialMeasures(base.losses * torch.tensor([1.0, 0.5]), {})
    assert float(other.relative(base).mean()) == pytest.approx(-0.25)


def test_contenders_have_as_many_rates_and_prompts_each():
    assert len({len(contender.rates) for contender in CONTENDERS.values()}) == 1
    study = Study("digits", None, None, 10)
    options = study.options("stages", Setting(1e-3, True), 0)
    assert options["grid"] ** 2 * options["grids"] == 16


def test_every_ablation_is_a_variant():
    from dmp_common import Patch
    from training.options.config import TrainConfig

    for changes in ablations().values():
        options = {**CONTENDERS["dmp-paper"].options, **changes}
        Patch.create("digits", **TrainConfig(**options).variant)


@pytest.fixture
def small(monkeypatch):
    """Fewer contenders, images and steps; jobs in this process."""
    full = subjects.digits()
    few = replace(full, samples=20, samplers={"ddim": 2}, draws=1, loss_images=10, options={
        **full.options, "train_batch_size": 8})  # fmt: skip
    monkeypatch.setattr("training.objective.relative.IMAGES", 16)
    monkeypatch.setattr(Study, "open", lambda self: few)
    monkeypatch.setattr(module, "CONFIRMATION_SEEDS", (101, 102))
    monkeypatch.setattr(module, "STRENGTHS", (1.0, 2.0))
    kept = {name: replace(CONTENDERS[name], rates=(1e-2,)) for name in ("prompt", "stages")}
    for place in (module, study_jobs):
        monkeypatch.setattr(place, "CONTENDERS", {**kept, "dmp-paper": kept["prompt"]})
    monkeypatch.setattr(
        module, "ablations", lambda: {"linear": {}, "none": {"learning_rate": 1e-3}}
    )
    done = []

    def do_all(study, jobs, processes):
        done.extend(do(study, job) for job in jobs)

    monkeypatch.setattr(module, "do_all", do_all)
    return done


def test_a_study_tunes_on_validation_and_confirms_on_test(small, tmp_path):
    study, names = Study("digits", None, tmp_path, 3), ["prompt", "stages"]
    table = tune(study, names, 1)
    assert table.count("(chosen)") == 2 and len(table.splitlines()) == 3 + 3
    table = confirm(study, names, 1)
    assert "| base |" in table and "| stages |" in table and "| stages minus |" in table
    folder = tmp_path / "digits" / "confirm" / "stages" / "101"
    assert (folder / "test.safetensors").is_file() and not (
        folder / "validation.safetensors"
    ).exists()
    assert "confirm.png" in plot(study, names)
    with Image.open(tmp_path / "digits" / "confirm.png") as picture:
        assert picture.size == (500, 450) and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(MissingError, match="run the stage confirm first"):
        plot(study, ["dmp-paper"])
    before = (folder / "trained.safetensors").stat().st_mtime_ns
    table = confirm(study, ["stages"], 1, LATE)
    assert "| stages |" in table
    whole = study.measures("confirm/stages/101", "test")
    only = study.measures("confirm/stages/101", "test", first=LATE)
    base = study.measures("base", "test")
    assert torch.equal(only.losses[:, 5:], base.losses[:, 5:])  # it does not act there
    assert torch.equal(only.losses[:, :5], whole.losses[:, :5])
    table = strengths(study, ["stages"], 1)
    assert "| stages x 2 |" in table
    assert (folder / "trained.safetensors").stat().st_mtime_ns == before  # not trained again
    tune(study, ["dmp-paper"], 1)
    assert "| none |" in ablate(study, 1)


@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"method": "prompt"}, {"method": "dmp", **presets.CLEAN}],
    ids=["lora", "prompt", "dmp"],
)  # fmt: skip
def test_what_was_trained_on_a_part_acts_there_alone(small, tmp_path, options):
    study = Study("digits", None, tmp_path, 2)
    told = {"learning_rate": 1e-2, "seed": 0, "max_train_steps": 2, **options}
    do(study, Job("base", {}, "validation"))
    do(study, Job("x", {**told, "max_timestep": 500}, "validation"))
    base, found = study.measures("base", "validation"), study.measures("x", "validation")
    assert torch.equal(found.losses[:, 5:], base.losses[:, 5:])
    assert (found.losses[:, :5] != base.losses[:, :5]).any(0).all()
    assert found.frechet != base.frechet


def test_a_stage_before_its_tuning_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["study", "digits", "late", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    told = capsys.readouterr().err
    assert "expected prompt tuned in" in told and "run the stage tune first" in told


def test_a_folder_of_another_trial_is_refused(small, tmp_path):
    study = Study("digits", None, tmp_path, 2)
    do(study, Job("x", study.options("prompt", Setting(1e-3, False), 0), "validation"))
    with pytest.raises(ValueError, match="choose another folder"):
        do(study, Job("x", study.options("prompt", Setting(1e-2, False), 0), "validation"))


def test_cifar_needs_its_folder(tmp_path):
    with pytest.raises(ValueError, match="expected --data"):
        Study("cifar10", None, tmp_path, 2).open()
    with pytest.raises(FileNotFoundError, match="make_cifar"):
        Study("cifar10", tmp_path, tmp_path, 2).open()
