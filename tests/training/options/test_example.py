"""The annotated example configuration: complete, true, and valid."""

from __future__ import annotations

import re
from pathlib import Path

from training.options.command_line import read_options, read_toml
from training.options.config import TrainConfig
from training.options.helping import is_common, section_of

FILE = Path(__file__).resolve().parents[3] / "docs" / "example-config.toml"
_OPTION = re.compile(r"(# )?(\w+) = (.+)")


def test_it_holds_every_common_option_under_a_true_comment() -> None:
    found, comment, section = {}, [], ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if match := _OPTION.fullmatch(line):
            found[match[2]] = (section, " ".join(comment))
            comment = []
        elif line.startswith("# "):
            comment.append(line[2:])
        else:
            section, comment = (line.strip("[]").replace("_", " ") or section), []
    common = {n: info for n, info in TrainConfig.model_fields.items() if is_common(info)}
    assert found == {
        name: (section_of(info), info.description)
        for name, info in common.items()
        if name != "config_file"  # which names this file
    }


def test_all_its_options_are_valid_also_those_that_are_not_set(tmp_path: Path) -> None:
    assert read_options(read_toml(FILE)).problems == []
    lines = FILE.read_text(encoding="utf-8").splitlines()
    # One source of data, and steps or epochs: the rest goes together.
    alone = ("dataset_config", "dataset_name")
    every = [match[0].removeprefix("# ") for line in lines if (match := _OPTION.fullmatch(line))]
    copy = tmp_path / "all.toml"
    copy.write_text("\n".join(line for line in every if not line.startswith(alone)))
    found = read_options(read_toml(copy))
    assert (found.problems, found.warnings) == ([], [])
