"""What the README and the packaging promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dmp_common import Patch, get_base
from training.options.command_line import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_exactly_two_commands_to_set_up() -> None:
    blocks = re.findall(r"<!-- command: (\w+) -->\n```\n(.*?)\n```", README, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["quickstart", "test"]
    assert all("\n" not in command for _, command in blocks)
    options = blocks[0][1].partition("python training/train_dmp.py ")[2].split()
    config = parse_arguments(options)
    assert (config.base, config.recipe, config.student_quantization) == ("digits", "repair", "rtn3")
    assert (ROOT / ".ci" / "run").read_text().count("README.md") >= 1


def test_parameter_counts_of_the_readme() -> None:
    rows = re.findall(r"^\| (`.*?)\|.*?\| ([\d,]+)(?: for (\S+ ?\S*))? \|$", README, re.MULTILINE)
    counted = 0
    for bases, count, _ in rows:
        for name in re.findall(r"`([a-z][\w/-]+)`", bases):
            if name in ("dit-s/2", "dit-l/2", "dit-xl/2", "sd35-medium", "sd35-large"):
                continue  # the row gives the count of one of its bases
            with torch.device("meta"):
                patch = Patch.create(get_base(name))
            assert patch.saved_parameters == int(count.replace(",", ""))
            counted += 1
    assert counted >= 8


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def test_training_commands_of_readme_and_patches_are_complete() -> None:
    """Each names a base, data and a recipe; only paths are missing."""
    text = README + (ROOT / "docs" / "PATCHES.md").read_text(encoding="utf-8")
    commands = re.findall(r"python training/train_dmp\.py ((?:[^`\n]*\\\n)*[^`\n]*)", text)
    assert len(commands) >= 4
    for command in commands:
        config = parse_arguments(command.replace("\\\n", " ").split())
        assert config.recipe in ("repair", "guidance"), command
        assert config.dataset_name or config.train_data_dir or config.state_captions, command


def test_the_example_patch_is_what_the_page_says() -> None:
    patch = Patch.load(ROOT / "docs" / "patches" / "digits-repair-rtn3.safetensors")
    use = json.loads(patch.metadata["dmp.use"])
    assert (patch.variant.mix, use["cheap"]["quantization"]) == ("modulate", "rtn3")
    assert use["share_repaired"]["low"] > 0.8
    guiding = Patch.load(ROOT / "docs" / "patches" / "digits-guidance.safetensors")
    assert guiding.variant.guidance == 2.0
    assert json.loads(guiding.metadata["dmp.use"])["share_repaired"]["mean"] == pytest.approx(
        0.76, abs=0.005
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_versions_agree() -> None:
    import dmp_common

    assert dmp_common.__version__ == "0.1.0"
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_root_package_is_harmless_without_comfyui() -> None:
    import importlib.util
    import sys

    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("dmp_root", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sys.path == before


def test_the_notebook_runs_the_quickstart() -> None:
    """Its cells compile, its commands are the README's, and the lines that use the patch run."""
    book = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    shell = [cell for cell in cells if cell.startswith(("!", "%"))]
    command = re.search(r"<!-- command: quickstart -->\n```\n(.*?)\n```", README)
    assert command is not None
    install, train = command[1].split(" && ")
    assert shell == [
        install.replace("pip install", "%pip install --quiet"),
        f"!{train} --overwrite",
    ]
    for cell in cells:
        if cell not in shell:
            compile(cell, "cell", "exec")
    assert all(cell.get("outputs", []) == [] for cell in book["cells"])
