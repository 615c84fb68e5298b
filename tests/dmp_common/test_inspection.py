"""`python -m dmp_common inspect`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmp_common import Patch, bases, register_base
from dmp_common.__main__ import main
from dmp_common.patch.file import file_hash
from dmp_common.tools.inspect import as_text, inspect_file

BASE = register_base(
    bases.dit(
        "six-blocks", depth=6, width=96, patch_size=2, in_channels=1, frequency_shift=1, grid=(4, 4)
    )
)


@pytest.fixture
def patch_file(tmp_path) -> Path:
    path = tmp_path / "my patch.safetensors"
    metadata = {"ss_steps": "500", "author": "Ann\x1b[31m\nBob", "modelspec.title": "Sharper"}
    Patch.create(BASE).save(path, {**metadata, "ss_notes": "n" * 500})
    return path


@pytest.fixture
def bad_file(tmp_path) -> Path:
    path = tmp_path / "bad.safetensors"
    save_file({"lora_up.weight": torch.zeros(2, 2)}, path)
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that printed nothing else."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_inspect_shows_everything(patch_file, capsys):
    assert run("inspect", patch_file) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    size = patch_file.stat().st_size
    gate, prompts = 97 * 16 + 16, 6 * 16 * 96
    for expected in (
        str(patch_file),
        "base six-blocks",
        f"hash {file_hash(patch_file)}",
        f"format version 1, F32, {size / 1e6:.2f} MB",
        f"parameters {gate + prompts:,}",
        f"prompts {prompts:,} ({prompts * 4 / size:.1%} of the file)",
        f"gate {gate:,} ({gate * 4 / size:.1%} of the file)",
        "sites 6 of 6 (all): block.0, block.1 ... block.5",
        "grid 4 x 4",
        "frequency_shift 1",
        "gate linear",
        "training (as its maker wrote it)",
        "ss_steps 500",
        "ss_notes " + "n" * 97 + "...",
        "modelspec.title Sharper",
        "author Ann\\x1b[31m\\nBob",
    ):
        assert expected in lines
    assert not any(line.startswith("* ") for line in lines)
    assert "dmp.config" not in out


def test_inspect_marks_what_differs_from_the_default(tmp_path, capsys):
    path = tmp_path / "p.safetensors"
    Patch.create("sd15", sites=["in.1", "mid"], grid=(2, 3), gate="attention").save(path)
    assert run("inspect", "--sites", path) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("* ")] == [
        "* sites 2 of 24: in.1, mid",
        "* grid 2 x 3 (default: 16 x 16)",
        "* prompts 6 (default: 256)",
        "* gate attention (default: linear)",
    ]
    ours = {"grids": 4, "gate_unit": "grid", "gate_form": "residual", "timesteps": (0, 500)}
    Patch.create("sd15", **ours).save(tmp_path / "ours.safetensors")
    assert run("inspect", tmp_path / "ours.safetensors") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "* gate_unit grid (default: prompt)" in told
    assert "* timesteps 0 to 500 (default: 0 to 1000)" in told
    table = lines.index("name depth width stride")
    assert lines[table + 1 : table + 3] == ["in.1 0 320 1", "mid 11 1280 8"]


def test_inspect_json_of_several_files(patch_file, tmp_path, capsys):
    half = tmp_path / "half.safetensors"
    Patch.create(BASE, gate="none", mix="prepend").save(half, dtype=torch.float16)
    assert run("inspect", "--json", patch_file, half) == 0
    full, other = json.loads(capsys.readouterr().out)
    assert full["metadata"]["ss_notes"] == "n" * 500
    assert full["not_default"] == []
    assert full["sites"][2] == {"name": "block.2", "depth": 2, "width": 96, "stride": 2}
    assert full["parameters"] == {"total": 10784, "prompts": 9216, "gate": 1568}
    assert other["dtypes"] == ["F16"]
    assert other["not_default"] == ["grid", "prompts", "gate", "mix"]
    assert other["stored_bytes"] == {"prompts": 6 * 50 * 96 * 2, "gate": 0}
    assert "gate 0" not in as_text(other)


def test_inspect_goes_on_after_a_bad_file(patch_file, bad_file, capsys):
    assert run("inspect", bad_file, patch_file) == 1
    out, err = capsys.readouterr()
    assert "base         six-blocks" in out
    assert err.count("\n") == 1
    assert f"error: {bad_file}: expected a DMP patch, found a LoRA" in err


@pytest.mark.parametrize("change", ["cut", "shape", "missing", "dtype"])
def test_inspect_notices_tensors_that_are_not_as_promised(change, patch_file, capsys):
    metadata = json.loads(json.dumps(Patch.load(patch_file).metadata))
    tensors = Patch.load(patch_file).tensors()
    if change == "shape":
        tensors["gate.bias"] = torch.zeros(17)
        message = "expected gate.bias of shape (16,), found (17,)"
    elif change == "missing":
        del tensors["prompts.block.3"]
        message = "expected 8 tensors, found a file without prompts.block.3"
    elif change == "dtype":
        tensors["gate.bias"] = torch.zeros(16, dtype=torch.float64)
        message = "expected gate.bias as F32, F16, BF16, found F64"
    else:
        patch_file.write_bytes(patch_file.read_bytes()[:-10])
        message = "expected a whole safetensors file"
    if change != "cut":
        save_file(tensors, patch_file, metadata=metadata)
    assert run("inspect", patch_file) == 1
    error = one_error(capsys)
    assert message in error
    assert str(patch_file) in error


def test_inspect_reads_no_values(patch_file):
    data = bytearray(patch_file.read_bytes())
    data[-40:] = b"\xff" * 40  # NaN
    patch_file.write_bytes(data)
    assert inspect_file(patch_file)["base"] == "six-blocks"
