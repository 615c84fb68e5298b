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
    assert named | {"scratch", "condition", "lora", "bases"} == set(TABLES)
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


@pytest.mark.parametrize("name", [n for n in TABLES if n != "figure5"])
def test_evaluation_takes_the_command(name: str, tmp_path: Path) -> None:
    place = experiment(tmp_path)
    for base in {cell.base for cell in TABLES[name].cells}:
        cells = [cell for cell in TABLES[name].cells if cell.base == base]
        command = place.evaluate_command(cells, tmp_path / "evaluation")
        options, config = parse_evaluation(command[2:])
        assert options.samples == 50000
        assert options.sample_steps == 250
        assert options.guidance_scale == (1.0 if base.startswith("ffhq") else 1.5)
        assert len(options.model) == sum(cell.method != "base" for cell in cells)
        assert config.base == place.setup.bases[base].options["base"]


def test_reported_values_are_those_of_the_paper() -> None:
    """Of the images of the tables on the project page."""
    dmp = {base: by_id(f"table2/{base}-dmp") for base in ("ffhq", "coco", "laion")}
    assert {name: (cell.step, cell.fid) for name, cell in dmp.items()} == {
        "ffhq": (30000, 5.87), "coco": (40000, 7.12), "laion": (50000, 35.44),
    }  # fmt: skip
    base, last = by_id("figure1/base").fid, by_id("figure1/dmp-50k").fid
    assert base is not None
    assert last is not None
    assert round(100 * (base - last) / base, 2) == 10.38  # of the abstract


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
    assert main(["table4a", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "table4a/attention" in printed
    assert "not found" in printed
    assert "table2" not in printed


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table2"]) == 1
    assert "expected --data_root and --out" in capsys.readouterr().err
    assert main(["collect", str(tmp_path / "none")]) == 1
    assert "expected the folder of results" in capsys.readouterr().err
