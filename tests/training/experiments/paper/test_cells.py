"""The cells of the paper's tables: each resolves through the trainer's own command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.evaluation.settings import parse_evaluation
from training.experiments.paper.__main__ import main
from training.experiments.paper.cells import Cell, choose, read_setup, read_table, table_names
from training.experiments.paper.experiment import Experiment, pairs
from training.options.command_line import ConfigError, as_toml, parse_arguments

TABLES = {name: read_table(name) for name in table_names()}
CELLS = [cell for table in TABLES.values() for cell in table.cells]
TRAINED = [cell for cell in CELLS if cell.method != "base"]


def by_id(name: str) -> Cell:
    return next(cell for cell in CELLS if cell.id == name)


def experiment(folder: Path, **options: object) -> Experiment:
    return Experiment(data=folder / "data", out=folder / "out", **options)


def test_every_table_of_the_task_is_there() -> None:
    letters = [f"table4{letter}" for letter in "abcdef"]
    named = {"table2", "table3", *letters, "figure1", "figure4", "figure5"}
    further = {"scratch", "condition", "lora", "bases", "imagenet", "initial"}
    assert named | further == set(TABLES)
    assert {cell.base for cell in CELLS} == set(read_setup().bases)


def test_ids_are_unique() -> None:
    assert len({cell.id for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", TRAINED, ids=lambda cell: cell.id)
def test_cell_is_a_configuration_of_the_trainer(cell: Cell, tmp_path: Path) -> None:
    """As the trainer reads it, from the file that the runner writes."""
    file = tmp_path / "cell.toml"
    file.write_text(as_toml(experiment(tmp_path).config(cell)), encoding="utf-8")
    config = parse_arguments(["--config_file", str(file)])
    assert config.method == cell.method
    assert config.max_train_steps == cell.step
    assert config.learning_rate == 1e-4
    assert config.gate_lr_factor == 10
    assert config.weight_decay == 0
    assert config.mixed_precision == "fp16"
    assert config.prompt_scale == "literal"
    assert config.gate_noise
    scratch = cell.base.endswith("untrained")
    assert config.ema_decay == (0.9999 if scratch else 0)
    assert config.global_batch_size == (256 if scratch else 128)
    assert config.save_every_n_steps is not None
    assert cell.step % config.save_every_n_steps == 0
    for name, value in cell.options.items():
        assert getattr(config, name) == value


def test_runs_differ_exactly_where_configurations_do(tmp_path: Path) -> None:
    place = experiment(tmp_path)
    texts: dict[str, str] = {}
    for cell in TRAINED:
        text = as_toml(place.config(cell, steps=1))
        assert texts.setdefault(cell.run, text) == text
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("name", [n for n in TABLES if n != "figure4"])
def test_evaluation_takes_the_command(name: str, tmp_path: Path) -> None:
    place = experiment(tmp_path)
    for base in {cell.base for cell in TABLES[name].cells}:
        cells = [cell for cell in TABLES[name].cells if cell.base == base]
        command = place.evaluate_command(cells, tmp_path / "evaluation")
        options, config = parse_evaluation(command[2:])
        assert options.samples == 50000
        assert options.sample_steps == 250
        assert options.guidance_scale == (1.0 if base.startswith("ffhq") else 1.5)
        assert options.guided_channels == (4 if base == "laion-sd15" else 3)
        assert len(options.model) == sum(cell.method != "base" for cell in cells)
        assert config.base == place.setup.bases[base].options["base"]


# Every value of the tables of the AAAI text, and the differences that it prints beside them.
TABLE2 = """
    ffhq 600 30 6.27 6.57 +0.30 6.81 +0.54 5.87 -0.40
    coco 450 40 7.33 7.51 +0.18 7.37 +0.04 7.12 -0.21
    laion - 50 47.18 52.99 +5.81 35.93 -11.25 35.44 -11.74"""
TABLE3 = """
    full 6.26 6.32 6.53 6.64 6.73 6.80 +0.54
    prompt 6.26 6.30 6.36 6.40 6.42 6.51 +0.25
    dmp 6.26 5.88 5.72 5.67 5.64 5.61 -0.65"""
TABLE4 = {
    "a": {"attention": 6.41, "linear": 5.87},
    "b": {"hard": 5.96, "soft": 5.87},
    "c": {"uniform": 5.97, "distinct": 5.87},
    "d": {"prepend": 6.79, "add": 5.87},
    "e": {"0": 6.27, "1": 6.13, "6": 5.99, "12": 5.87},
    "f": {"0-0": 6.11, "0-1": 5.96, "1-0": 5.97, "1-2": 5.95, "2-1": 5.95, "1-1": 5.87},
}


def reported(name: str) -> float:
    fid = by_id(name).fid
    assert fid is not None
    return fid


@pytest.mark.parametrize("row", TABLE2.split("\n")[1:], ids=lambda row: row.split()[0])
def test_table_2_is_the_papers(row: str) -> None:
    data, before, further, base, *rest = row.split()
    assert reported(f"table2/{data}-base") == float(base)
    for method, fid, change in zip(("full", "prompt", "dmp"), rest[::2], rest[1::2], strict=True):
        cell = by_id(f"table2/{data}-{method}")
        assert (cell.fid, cell.step) == (float(fid), 1000 * int(further))
        assert f"{float(fid) - float(base):+.2f}" == change
    pretrained = [cell for cell in TABLES["bases"].cells if cell.id == f"bases/{data}-dit-b"]
    assert [cell.step for cell in pretrained] == ([] if before == "-" else [1000 * int(before)])
    assert (
        len([cell for cell in TABLES["table2"].cells if cell.id.startswith(f"table2/{data}")]) == 4
    )


@pytest.mark.parametrize("name", ["table3", "figure1"])
def test_table_3_is_the_papers(name: str) -> None:
    for method, base, *fids, change in map(str.split, TABLE3.split("\n")[1:]):
        assert reported(f"{name}/base") == float(base)
        found = [reported(f"{name}/{method}-{step}k") for step in (10, 20, 30, 40, 50)]
        assert found == [float(fid) for fid in fids]
        assert f"{found[-1] - float(base):+.2f}" == change
    assert len(TABLES[name].cells) == 16
    assert {cell.base for cell in TABLES[name].cells} == {"ffhq-dit-l"}
    assert by_id("bases/ffhq-dit-l").step == 250_000
    base = reported(f"{name}/base")
    share = (base - reported(f"{name}/dmp-50k")) / base
    assert round(100 * share, 2) == 10.38  # of the abstract


@pytest.mark.parametrize("letter", TABLE4)
def test_table_4_is_the_papers(letter: str, tmp_path: Path) -> None:
    table = TABLES[f"table4{letter}"]
    assert {cell.id.split("/")[1]: cell.fid for cell in table.cells} == TABLE4[letter]
    assert table.source == f"Table 4 ({letter}) of the AAAI text"
    assert {cell.step for cell in table.cells} <= {0, 30_000}
    default = [cell for cell in table.cells if cell.fid == 5.87]
    assert [cell.run for cell in default] == [by_id("table2/ffhq-dmp").run]
    for cell in table.cells:
        if letter == "f":
            config = experiment(tmp_path).config(cell)
            weights = f"{config.importance_weight:.0f}-{config.load_weight:.0f}"
            assert cell.id.endswith(weights)


def test_every_figure_names_the_version_it_belongs_to() -> None:
    for name, table in TABLES.items():
        if name.startswith("figure"):
            assert table.source.startswith(f"Figure {name[-1]} of the AAAI text")
    kinds = {name: table.drawn for name, table in TABLES.items() if table.drawn}
    assert kinds == {
        "figure1": "lines", "figure4": "heatmaps", "figure5": "samples", "table4e": "lines",
    }  # fmt: skip


def test_steps_of_one_run_share_it() -> None:
    runs = {cell.run for cell in TABLES["figure1"].cells if cell.method == "dmp"}
    assert len(runs) == 1
    assert by_id("table4a/linear").run == by_id("table2/ffhq-dmp").run


def test_cells_are_chosen_by_id() -> None:
    table = TABLES["table2"]
    assert [cell.id for cell in choose(table, ["ffhq-dmp"])] == ["table2/ffhq-dmp"]
    assert choose(table, ["table2/ffhq-dmp"]) == choose(table, ["ffhq-dmp"])
    with pytest.raises(ConfigError, match="expected a cell of table2: .*; found table2/nothing"):
        choose(table, ["nothing"])
    with pytest.raises(ConfigError, match="expected one of bases, .*, found 'table9'"):
        read_table("table9")


def test_options_of_the_command_line_win(tmp_path: Path) -> None:
    changed = pairs(["train_batch_size=32", "--flip_aug=false"], "--set")
    config = experiment(tmp_path, training=changed).config(by_id("table2/ffhq-dmp"))
    assert config.train_batch_size == 32
    assert config.flip_aug is False
    with pytest.raises(ConfigError, match="--set: expected NAME=VALUE, found 'x'"):
        pairs(["x"], "--set")
    with pytest.raises(ConfigError, match="did you mean --learning_rate"):
        experiment(tmp_path, training={"learnin_rate": "1"}).config(by_id("table2/ffhq-dmp"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(cell.id in printed for cell in CELLS)
    assert main(["initial", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "initial/random" in printed
    assert "not found" in printed
    assert "table2" not in printed


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table2"]) == 1
    assert "expected --data_root and --out" in capsys.readouterr().err
    assert main(["collect", str(tmp_path / "none")]) == 1
    assert "expected the folder of results" in capsys.readouterr().err
