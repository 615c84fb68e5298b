"""The study of cheap calls: controls that keep what they promise, measures, tables and choices."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.base.cheap import open_cheap
from training.base.layers import linear_layers
from training.base.rounding import round_groups
from training.base.stored_size import stored_size
from training.experiments.cheap import cheap_study, cheap_trial, judging
from training.experiments.cheap import comparisons as plan
from training.experiments.cheap.calls import CheapCall, bytes_in_groups
from training.experiments.cheap.cheap_figure import draw_figure
from training.experiments.cheap.cheap_tables import main, tables, updated
from training.experiments.cheap.cheap_trial import CheapTrial
from training.experiments.cheap.findings import Findings
from training.experiments.cheap.judging import calibration
from training.experiments.cheap.measures import (
    CheapJob,
    Measures,
    UseOfModel,
    read_measures,
    write_results,
)
from training.experiments.cheap.quantisers import (
    fit_channels,
    gptq,
    input_moments,
    mixed_bits,
    use_bits,
)
from training.experiments.cheap.remedies import REMEDIES
from training.options.config import TrainConfig

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def rounded():
    """The digits' full model, their rounded one, and what controls see."""
    trial = CheapTrial("digits", None, Path())
    subject = trial.open()
    exact, cheap = trial.models(subject, plan.BITS_3)
    return exact, cheap, calibration(subject, exact)


def errors(exact, cheap, batches):
    """The squared error of each layer's output on its inputs in the exact model, by path."""
    moments, originals = input_moments(exact, batches), linear_layers(exact.model)
    found = {}
    for path, layer in linear_layers(cheap.model).items():
        change = layer.weight.double() - originals[path].weight.double()
        shift = layer.bias.double() - originals[path].bias.double()
        mean, second = moments[path].mean, moments[path].second
        square = ((change @ second) * change).sum(1) + 2 * shift * (change @ mean) + shift**2
        found[path] = float(square.detach().sum())
    return found


def test_channel_fit_is_the_best_scale_and_shift(rounded):
    exact, _, batches = rounded
    cheap = open_cheap(base="digits", student_quantization=plan.BITS_3)
    before = errors(exact, cheap, batches)
    fit_channels(exact, cheap, batches)
    after = errors(exact, cheap, batches)
    assert all(after[path] < before[path] for path in before)
    layer = next(iter(linear_layers(cheap.model).values()))
    with torch.no_grad():
        layer.bias += 1e-3  # any other shift is worse
    assert errors(exact, cheap, batches)[next(iter(after))] > after[next(iter(after))]


def test_gptq_has_fewer_levels_and_less_error_than_the_nearest():
    torch.manual_seed(0)
    inputs = torch.randn(500, 8) @ torch.randn(8, 64)  # of few directions, as real ones are
    weight = torch.randn(16, 64)
    second = (inputs.T @ inputs / len(inputs)).double()
    rounded = gptq(weight, second, 3)
    assert all(len(group.unique()) <= 8 for row in rounded for group in row.split(32))

    def error(other):
        return float(((weight - other) @ inputs.T).square().mean())

    assert error(rounded) < 0.5 * error(round_groups(weight, 3))
    # With inputs of all directions alike there is nothing to make up for.
    torch.testing.assert_close(gptq(weight, torch.eye(64), 3), round_groups(weight, 3))


def test_mixed_precision_spends_its_bytes_and_no_more(rounded):
    exact, cheap, batches = rounded
    few = [(noisy[:16], t[:16], {"labels": given["labels"][:16]}) for noisy, t, given in batches]
    weights = {path: layer.weight for path, layer in linear_layers(cheap.model).items()}
    bits = mixed_bits(exact, cheap, few, 3, 20_000)
    assert all(layer.weight is weights[p] for p, layer in linear_layers(cheap.model).items())
    layers = linear_layers(exact.model).items()
    spent = sum(
        bytes_in_groups(one.out_features, one.in_features, bits[path])
        - bytes_in_groups(one.out_features, one.in_features, 3)
        for path, one in layers
    )
    smallest = min(one.weight.numel() // 8 for _, one in layers)
    assert 20_000 - smallest < spent <= 20_000
    other = open_cheap(base="digits", student_quantization=plan.BITS_3)
    use_bits(exact, other, bits)
    path = max(bits, key=lambda path: bits[path])
    original = linear_layers(exact.model)[path].weight
    assert torch.equal(linear_layers(other.model)[path].weight, round_groups(original, bits[path]))


def test_bytes_are_those_of_the_file_format(rounded):
    """Four bits, and half precision's scale and minimum of 32: 5 bits a value."""
    assert bytes_in_groups(64, 64, 4) == 64 * 64 * 5 // 8
    exact, _, _ = rounded
    layers = linear_layers(exact.model).values()
    values = sum(parameter.numel() for parameter in exact.model.parameters())
    few = sum(bytes_in_groups(one.out_features, one.in_features, 3) for one in layers)
    rest = 2 * (values - sum(one.weight.numel() for one in layers))
    form = TrainConfig(student_quantization=CheapCall("gptq3-group32").stored_as)
    assert stored_size(exact.model, form) == few + rest


def test_calls_are_read_and_refused():
    both = CheapCall("rtn3-group32+guidance-2")
    assert (both.bits, both.guidance, both.by_gptq) == (3, 2.0, False)
    assert both.options == {
        "student_quantization": "rtn3-group32",
        "teacher_guidance_scale": "2",
    }
    assert CheapCall("gptq2-group32").bits == 2
    assert CheapCall("exact").options == {}
    for wrong in ("rtn", "guidance-", "rtn3-group16", "gptq3", "exact+rtn3"):
        with pytest.raises(ValueError, match="expected a cheap call"):
            CheapCall(wrong)


def test_a_trial_is_judged_once_and_the_full_model_has_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PICTURES", 20)
    monkeypatch.setattr("training.objective.relative.IMAGES", 16)
    monkeypatch.setattr(judging, "_HELD_OUT", 16)
    trial = CheapTrial("digits", None, tmp_path)
    use = UseOfModel(steps=2)
    job = CheapJob("digits", plan.BITS_3, "repair", 1e-2, 2, 7, "validation", use)
    found = trial.done(job)
    assert found.evaluations == 2
    assert found.added_bytes == 2 * (46_080 + 260)
    full = trial.done(replace(job, method="full model", use=UseOfModel()))
    assert (full.pixels, full.gap, full.features) == (0.0, 0.0, 0.0)
    assert full.stored_bytes > found.stored_bytes
    scaled = UseOfModel(epsilon_scale=1.02)
    assert trial.done(replace(job, method="full model", use=scaled)).pixels > 0
    monkeypatch.setattr(judging.Judge, "judge", None)  # what is done is not done again
    assert trial.done(job) == found
    # The same measures from the collected file.
    main([str(tmp_path), "--write", str(tmp_path / "all.json")])
    assert read_measures(tmp_path / "all.json")[job] == found


def test_gptq_calls_train_on_gptq_weights(tmp_path):
    trial = CheapTrial("digits", None, tmp_path)
    exact, cheap = trial.models(trial.open(), "gptq3-group32")
    path, layer = next(iter(linear_layers(cheap.model).items()))
    assert len(layer.weight[0, :32].unique()) <= 8
    nearest = round_groups(linear_layers(exact.model)[path].weight, 3)
    assert not torch.equal(layer.weight, nearest)


def test_a_block_that_is_left_out_gives_what_it_gets(tmp_path):
    trial = CheapTrial("digits", None, tmp_path)
    exact, cheap = trial.models(trial.open(), "skip2")
    blocks = exact.model.transformer_blocks
    del blocks[2]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    given = {"timestep": t, "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        torch.testing.assert_close(cheap.model(x, **given).sample, exact.model(x, **given).sample)
    made = REMEDIES["repair"].all_options("skip2", {}, 1e-2, 0, 1)
    assert "block.1.mod" in made["dmp_sites"]
    assert "block.2." not in made["dmp_sites"]


def test_a_sibling_takes_the_patch_of_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PICTURES", 10)
    monkeypatch.setattr("training.objective.relative.IMAGES", 16)
    monkeypatch.setattr(judging, "_HELD_OUT", 16)
    monkeypatch.setitem(cheap_trial._FINE_TUNING, "max_train_steps", 2)
    jobs = plan.on_sibling("digits", {(plan.BITS_3, "repair"): 1e-2})
    assert [job.method for job in jobs][-1] == plan.BASES_PATCH
    job = replace(jobs[-1], steps=1, use=UseOfModel(steps=2))
    found = CheapTrial("digits-sibling", None, tmp_path).done(job)
    assert found.pixels > 0
    trained = CheapJob("digits", plan.BITS_3, "repair", 1e-2, 1, plan.SEEDS[0]).folder
    assert (tmp_path / trained / "trained.safetensors").is_file()


def test_rates_grow_until_the_best_is_inside():
    class Trial:
        subject = "digits"

        def __init__(self, best):
            self.best = best

        def gap(self, job):
            return abs(math.log(job.rate / self.best))

    found = cheap_study.tuned(Trial(1e-4), plan.BITS_3, "repair", 1)
    assert found.best == pytest.approx(1e-4, rel=0.5)
    assert min(found.tried) < found.best < max(found.tried)
    with pytest.raises(ValueError, match="expected a best value"):
        cheap_study.tuned(Trial(1e9), plan.BITS_3, "repair", 1)


def measures(pixels, frechet=1.0):
    return Measures(
        pixels, 0.0, pixels, frechet, frechet, 0.9, 0.8, 0.95, (pixels,), 20, 1000, 5000
    )


def made_up(ours):
    """Measures of a study in which ours leaves a share of the damage and all others half."""
    found = {}
    rates = {(call, name): 1e-2 for call in (plan.BITS_3, plan.GUIDED) for name in REMEDIES}
    for subject in plan.SUBJECTS:
        for job in plan.primary(subject, rates):
            wobble = 1 + (job.seed - 103) * (0.01 if job.method == "repair" else 0.02)
            left = {"none": 1.0, "full model": 0.5 if job.call == plan.GUIDED else 0.0}
            left |= {"repair": ours, "modulation": ours, "gated-small": ours}
            share = left.get(job.method, 0.5) * wobble
            found[job] = measures(float(f"{0.02 * share:.6g}"), 1.0 + round(share, 4))
    return found


def test_the_goals_alone_make_their_table():
    goals = {job for s in plan.SUBJECTS for job in plan.of_goals(s, {})}
    whole = made_up(0.1)
    assert goals < set(whole)
    table = tables({job: whole[job] for job in goals})["goals"]
    assert table == tables(whole)["goals"]
    assert "not measured" not in table


def test_tables_say_what_is_left_and_whether_it_is_different(tmp_path):
    results = made_up(0.1)
    made = tables(results)
    assert "| digits | 3 | 10.0 [9." in made["goals"]
    assert len(made["goals"].splitlines()) == 6
    rows = made["primary"].splitlines()[2:]
    assert len(rows) == 12
    assert all("| 10.0% | 50.0% |" in row for row in rows)
    assert all(row.rstrip(" |").endswith("< 0.0001") for row in rows)
    # A comparison that holds on one base alone does not hold.
    for job in list(results):
        if job.subject == "digits" and job.method == "lora":
            results[job] = measures(0.0022 if job.seed % 2 else 0.0018)
    lora = [row for row in tables(results)["primary"].splitlines() if "| 10.0% |" in row]
    assert any("LoRA" in row for row in lora)
    corrected = tables(results)["primary"].splitlines()[2:][5].split("|")[-2]
    assert float(corrected) > 0.05
    # Nor does one that goes opposite ways.
    for job in list(results):
        if job.subject == "digits" and job.method == "lora":
            results[job] = measures(0.0011 if job.seed % 2 else 0.001)
    assert tables(results)["primary"].splitlines()[2:][5].split("|")[-2].strip() == "1.0000"
    assert float(
        Findings(results).left("digits", plan.Model(plan.BITS_3, "none")).mean()
    ) == pytest.approx(1)
    path = tmp_path / "some.json"
    write_results(results, path)
    assert read_measures(path) == results
    draw_figure(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_missing_measures_are_said_and_unknown_tables_refused():
    assert "not measured" in tables({})["primary"]
    text = "before\n<!-- table: goals -->\nold\n<!-- end of table -->\nafter"
    new = updated(text, {"goals": "| new |"})
    assert new == "before\n<!-- table: goals -->\n\n| new |\n\n<!-- end of table -->\nafter"
    assert updated(new, {"goals": "| new |"}) == new
    with pytest.raises(ValueError, match="expected one of the tables goals"):
        updated(text.replace("goals", "gaols"), {"goals": ""})


def test_command_lines_that_cannot_be_done_end_in_one_sentence(tmp_path, capsys, monkeypatch):
    def said(command, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit):
            command()
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "bad.json").write_text('{"a": 1}', encoding="utf-8")
    measured = ROOT / "docs" / "results" / "cheap-calls.json"
    out = ("--out", tmp_path / "out")
    study = cheap_study.main
    assert "of at least 1, found 0" in said(study, "digits", "goals", "--processes", 0, *out)
    assert "found 'rtn9'" in said(study, "digits", "tune", "--call", "rtn9", *out)
    assert "expected --data" in said(study, "cifar10-s", "goals", *out)
    assert "found another kind of JSON" in said(main, tmp_path / "bad.json")
    assert "measures of the study in" in said(main, tmp_path / "none.json")
    assert "found none" in said(main, tmp_path)
    assert "No such file" in said(main, measured, "--figure", tmp_path / "none" / "figure.png")


def test_the_page_has_the_tables_of_the_measures():
    measured = ROOT / "docs" / "results" / "cheap-calls.json"
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert updated(text, tables(read_measures(measured))) == text
