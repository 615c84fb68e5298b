"""The command line: every command's good and bad paths, exit codes and what is said."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dmp_common import Patch, bases, register_base
from dmp_common.__main__ import main
from dmp_common.patch.file import file_hash

BASE = register_base(
    bases.dit(
        "six-blocks", depth=6, width=96, patch_size=2, in_channels=1, frequency_shift=1, grid=(4, 4)
    )
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def patch_file(tmp_path) -> Path:
    path = tmp_path / "my patch.safetensors"
    Patch.create(BASE).save(path)
    return path


@pytest.fixture
def bad_file(tmp_path) -> Path:
    path = tmp_path / "bad.safetensors"
    save_file({"lora_up.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture
def model_file(tmp_path) -> Path:
    """The parts of an original-format DiT that a heat map needs."""
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x_embedder.proj.weight": torch.zeros(96, 1, 2, 2),
        "y_embedder.embedding_table.weight": torch.randn(11, 96, generator=generator),
        "blocks.5.mlp.fc1.bias": torch.zeros(1),
        "t_embedder.mlp.0.weight": torch.randn(96, 256, generator=generator) / 16,
        "t_embedder.mlp.0.bias": torch.zeros(96),
        "t_embedder.mlp.2.weight": torch.randn(96, 96, generator=generator) / 9,
        "t_embedder.mlp.2.bias": torch.zeros(96),
    }
    save_file(tensors, path)
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


COMMANDS = ("inspect", "validate", "heatmap", "convert", "push")


def test_help_in_a_process_of_its_own():
    command = [sys.executable, "-m", "dmp_common", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in (*COMMANDS, "Exit code", "usage: python -m dmp_common "):
        assert word in done.stdout


def test_help_needs_no_torch():
    """As the installed command runs it; torch takes seconds to import."""
    code = (
        "import sys; from dmp_common.__main__ import main; sys.argv = ['dmp', '--help']\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'safetensors', 'PIL'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: dmp ")
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    assert f"examples:\n  dmp {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["paint"],
        ["inspect"],
        ["validate"],
        ["heatmap", "a", "b.png"],
        ["heatmap", "a", "b.png", "--model", "m", "--steps", "many"],
        ["heatmap", "a", "b.png", "--model", "m", "--scale", "own"],
        ["convert", "a"],
        ["convert", "a", "b", "--mix", "stir"],
        ["push", "a"],
        ["push", "a", "b/c", "--picture", "d"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: dmp" in err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("dmp 0.")


# validate


def test_validate(patch_file, bad_file, tmp_path, capsys):
    assert run("validate", patch_file) == 0
    out, err = capsys.readouterr()
    assert out == f"OK {file_hash(patch_file)} {patch_file} (six-blocks)\n"
    assert err == ""
    assert run("validate", bad_file, tmp_path / "nowhere", patch_file) == 1
    out, err = capsys.readouterr()
    assert out.startswith("OK ")
    assert out.count("\n") == 1
    first, second = err.splitlines()
    assert first.startswith(f"error: {bad_file}: expected a DMP patch, found a LoRA")
    assert second.startswith(f"error: {tmp_path / 'nowhere'}: expected a patch file")


def test_validate_looks_at_values(patch_file, capsys):
    data = bytearray(patch_file.read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"
    patch_file.write_bytes(data)
    assert run("validate", patch_file) == 1
    assert "found NaN or infinity" in one_error(capsys)


# heatmap


def test_heatmap(patch_file, model_file, tmp_path, capsys):
    out = tmp_path / "pictures" / "gate.png"
    assert run("heatmap", patch_file, out, "--model", model_file, "--steps", 8) == 0
    assert capsys.readouterr().out == f"Wrote {out}\n"
    with Image.open(out) as image:
        three = image.size
    words = ["heatmap", patch_file, out, "--model", model_file, "--sites", "all"]
    assert run(*words) == 1
    error = one_error(capsys)
    assert f"{out}: expected the name of a new file" in error
    assert "--force" in error
    assert run(*words, "--force", "--scale", "shared", "--log", "--title", "Mine") == 0
    with Image.open(out) as image:
        assert image.width == three[0]
        assert image.height > 1.5 * three[1]


def test_heatmap_of_a_gate_that_sees_the_class(tmp_path, model_file, capsys):
    path, out = tmp_path / "p.safetensors", tmp_path / "a.png"
    Patch.create(BASE, condition="t+y").save(path)
    words = ["heatmap", path, out, "--model", model_file]
    assert run(*words) == 1
    assert "--label" in one_error(capsys)
    assert run(*words, "--label", 11) == 1
    assert "from 0 to 10, found 11" in one_error(capsys)
    assert not out.exists()
    assert run(*words, "--label", 10) == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "3"], "sees the timestep only"),
        (["--sites", "in.1"], "found 'in.1'"),
        (["--steps", "0"], "expected at least one step, found 0"),
    ],
)
def test_heatmap_refuses(words, message, patch_file, model_file, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert run("heatmap", patch_file, out, "--model", model_file, *words) == 1
    assert message in one_error(capsys)
    assert not out.exists()


def test_heatmap_refuses_files(patch_file, bad_file, model_file, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert run("heatmap", bad_file, out, "--model", model_file) == 1
    assert "expected a DMP patch" in one_error(capsys)
    assert run("heatmap", patch_file, out, "--model", bad_file) == 1
    assert f"{bad_file}: expected the time embedding of base six-blocks" in one_error(capsys)
    assert run("heatmap", patch_file, tmp_path / "a.gif", "--model", model_file) == 1
    assert "ending in .png" in one_error(capsys)
    assert run("heatmap", patch_file, patch_file, "--model", model_file, "--force") == 1
    assert "ending in .png" in one_error(capsys)


# convert


@pytest.fixture
def official_file(tmp_path) -> Path:
    path = tmp_path / "official.pt"
    tensors = {
        "prompt_embeddings": torch.randn(1, 256, 384),
        "gate.weight": torch.randn(256, 385),
        "gate.bias": torch.randn(256),
    }
    torch.save({"model": tensors}, path)
    return path


def test_convert(official_file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    words = ["convert", official_file, out, "--base", "dit-s/2", "--mix", "add"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert said == (
        f"Wrote {out} ({file_hash(out)}): dit-s/2, 1 sites, 197,120 parameters; prompts: added, "
        "gate: linear, condition: t+y\n"
    )
    assert Patch.load(out).variant.condition == "t+y"
    before = out.read_bytes()
    assert run(*words) == 1
    assert "expected the name of a new file" in one_error(capsys)
    assert out.read_bytes() == before
    assert run(*words, "--force") == 0


def test_convert_refuses(patch_file, official_file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert run("convert", patch_file, out) == 1
    assert str(patch_file) in one_error(capsys)
    assert run("convert", official_file, out, "--base", "dit-q/2") == 1
    assert "dit-q/2" in one_error(capsys)
    assert run("convert", tmp_path / "nowhere.pt", out) == 1
    assert "nowhere.pt" in one_error(capsys)
    assert not out.exists()


# push


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """What is uploaded, by repository; the upload itself is tested with a server elsewhere."""
    repositories: dict[str, dict[str, bytes]] = {}

    def push_files(repo_id: str, files: Mapping[str, bytes], **options: object) -> str:
        assert options == {
            "token": None, "private": True, "message": "Upload my patch.safetensors"
        }  # fmt: skip
        repositories[repo_id] = dict(files)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr("dmp_common.tools.publish.push_files", push_files)
    return repositories


def test_push(patch_file, tmp_path, pushed, capsys):
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"png")
    words = ["push", patch_file, "me/nice", "--private", "--license", "mit", "--tag", "cats"]
    assert run(*words, "--tag", "dogs", "--picture", "A cat", picture) == 0
    assert capsys.readouterr().out == f"Uploaded {patch_file} to https://hub/me/nice\n"
    files = pushed["me/nice"]
    assert sorted(files) == ["README.md", "my patch.safetensors", "pictures/cat.png"]
    assert files["my patch.safetensors"] == patch_file.read_bytes()
    card = files["README.md"].decode()
    for words in ('license: "mit"', '"cats", "dogs"', "![A cat](pictures/cat.png)"):
        assert words in card


def test_push_refuses(patch_file, bad_file, tmp_path, pushed, capsys):
    picture = ("--picture", "A cat", tmp_path / "cat.png")
    for words, message in (
        ((bad_file, "me/nice"), "found a LoRA"),
        ((patch_file, "nice"), 'expected a repository as "user/repo"'),
        ((patch_file, "me/nice", *picture), "expected a picture at"),
        ((patch_file, "me/nice", *picture, *picture), "expected a caption for each picture"),
    ):
        assert run("push", *words) == 1
        assert message in one_error(capsys)
    assert pushed == {}
