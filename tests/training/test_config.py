"""The command line: presets, readable errors, nothing silently ignored."""

from __future__ import annotations

import pytest

from training.config import PRESETS, TrainConfig, parse_arguments


def test_command_line_beats_preset_beats_default() -> None:
    plain = parse_arguments(["--base", "digits"])
    assert plain.learning_rate == PRESETS["digits"]["learning_rate"]
    assert plain.max_grad_norm == TrainConfig.model_fields["max_grad_norm"].default
    assert parse_arguments(["--learning_rate", "0.5"]).learning_rate == 0.5


def test_presets_are_valid() -> None:
    for base, preset in PRESETS.items():
        assert TrainConfig(base=base, **preset).base == base


def test_names_take_the_base() -> None:
    config = TrainConfig(base="dit-b/2")
    assert config.output_dir == "output/dit-b-2"
    assert config.output_name == "dit-b-2-dmp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", "1"], "did you mean --learning_rate?"),
        (["--quantum_flux", "1"], "unknown option --quantum_flux, see --help"),
        (["--learning_rate", "-1"], "--learning_rate: Input should be greater than 0, found '-1'"),
        (["--max_train_steps", "many"], "--max_train_steps"),
        (["--gate", "quantum"], "invalid choice: 'quantum'"),
        (["stray"], "'stray'"),
        (["--dmp_depth", "2", "--dmp_sites", "all"], "give one of them"),
        (["--learning", "1"], "unknown option --learning"),  # no silent abbreviations
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, info in TrainConfig.model_fields.items():
        assert f"--{name}" in printed.split()
        assert info.description


def test_sites_and_variant() -> None:
    assert "sites" not in parse_arguments([]).variant
    assert parse_arguments(["--dmp_depth", "3"]).variant["sites"] == 3
    assert parse_arguments(["--dmp_sites", "all"]).variant["sites"] == "all"
    assert parse_arguments(["--dmp_sites", "block.1"]).variant["sites"] == ["block.1"]
    assert parse_arguments(["--dmp_sites", "mid,in.1"]).variant["sites"] == ["mid", "in.1"]
    assert parse_arguments(["--grid", "8"]).variant["grid"] == 8
