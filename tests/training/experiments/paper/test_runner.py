"""Running tables: exact commands, what is skipped, what goes on, and the results in one file."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dmp_common import PatchError
from tests.tiny import FAMILIES
from tests.training.conftest import Folders
from training.base.frozen import FrozenBase, load_frozen
from training.experiments.paper import figures, runner, untrained
from training.experiments.paper.__main__ import main
from training.experiments.paper.cells import Untrained
from training.experiments.paper.experiment import SCRIPTS
from training.experiments.paper.results import read_results
from training.options.command_line import parse_arguments, resolve
from training.run.state import state_folder


class Commands:
    """Stands for the real commands: writes what they leave, and remembers what was asked."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.code = 0

    def __call__(self, command: list[str]) -> int:
        self.given.append(command)
        if self.code == 0 and "--config_file" in command:
            train(Path(command[command.index("--config_file") + 1]))
        elif self.code == 0:
            evaluate(command)
        return self.code


def train(config_file: Path) -> None:
    """Files, gates and states of every 10,000 steps, the last under the final name."""
    config = parse_arguments(["--config_file", str(config_file)])
    folder, name, every = Path(config.output_dir), config.output_name, config.save_every_n_steps
    assert every
    for step in range(every, config.max_train_steps + 1, every):
        stem = name if step == config.max_train_steps else f"{name}-step{step:08d}"
        path = folder / f"{stem}.safetensors"
        if config.trains_base:
            path = folder / stem / "transformer" / "diffusion_pytorch_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, path, {"ss_steps": str(step)})
        (folder / f"{stem}-gate.png").write_bytes(str(step).encode())
        state = state_folder(folder, name, step)
        state.mkdir(exist_ok=True)
        (state / "state.json").write_text("{}", encoding="utf-8")


def evaluate(command: list[str]) -> None:
    """FID 5 and a little more for every further model; the base has 6."""
    out = Path(command[command.index("--out") + 1])
    labels = [w.split("=")[0] for n, w in itertools.pairwise(command) if n == "--model"]
    report(out, {"base": 6.0, **{label: 5 + n / 10 for n, label in enumerate(labels)}})
    (out / "samples.png").write_bytes(b"samples")


def report(out: Path, fids: dict[str, float], samples: int = 50000) -> None:
    out.mkdir(parents=True)
    models = {
        label: {"metrics": {"fid": fid, "kid": None}, "loss": 0.1, "samples": samples}
        for label, fid in fids.items()
    }
    differences = [
        {"model": label, "against": "base", "measure": "fid", "mean": fid - fids["base"],
         "low": fid - fids["base"] - 0.5, "high": fid - fids["base"] + 0.5, "n": samples,
         "over": "samples"}
        for label, fid in fids.items()
        if label != "base"
    ]  # fmt: skip
    contents = {"format": 1, "models": models, "differences": differences}
    (out / "evaluation.json").write_text(json.dumps(contents), encoding="utf-8")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    stand_in = Commands()
    monkeypatch.setattr(runner, "start", stand_in)
    return stand_in


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    return ["--data_root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]


def results(folder: Path) -> dict[str, Any]:
    contents = json.loads((folder / "paper.json").read_text(encoding="utf-8"))
    return {c["id"]: c for table in contents["tables"].values() for c in table["cells"]}


def test_a_table_from_training_to_results(
    tmp_path: Path, commands: Commands, place: list[str]
) -> None:
    out = tmp_path / "out"
    launch = ["--launch", "accelerate launch --num_processes 8"]
    only = ["--only", "ffhq-base", "--only", "ffhq-full", "--only", "ffhq-dmp"]
    evaluated = ["--evaluate", "inception_weights=w.pth"]
    assert main(["table2", *place, *only, *launch, *evaluated]) == 0
    script = str(SCRIPTS / "train_dmp.py")
    full, dmp = (out / "runs" / f"ffhq-dit-b-{method}" for method in ("full", "dmp"))
    assert commands.given[:2] == [
        ["accelerate", "launch", "--num_processes", "8", script, "--config_file",
         str(out / "configs" / f"ffhq-dit-b-{method}.toml")]
        for method in ("full", "dmp")
    ]  # fmt: skip
    assert commands.given[2] == [
        sys.executable, str(SCRIPTS / "evaluate.py"),
        "--validation_split", "0", "--no_half_vae", "--max_data_loader_n_workers", "8",
        "--train_data_dir", (tmp_path / "data" / "ffhq").as_posix(), "--resolution", "256",
        "--base", "dit-b/2",
        "--pretrained_model_name_or_path", (tmp_path / "data/bases/ffhq-dit-b").as_posix(),
        "--unconditional",
        "--model", f"ffhq-dit-b-full-step30000=full:{full / 'ffhq-dit-b-full-step00030000'}",
        "--model",
        f"ffhq-dit-b-dmp-step30000=dmp:{dmp / 'ffhq-dit-b-dmp-step00030000.safetensors'}",
        "--samples", "50000", "--sample_steps", "250", "--guidance_scale", "1.0",
        "--guided_channels", "3", "--sampler", "ddpm", "--seed", "0", "--metrics", "fid",
        "--reference", "train",
        "--images", "10000", "--loss_draws", "1", "--inception_weights", "w.pth",
        "--out", str(out / "evaluations" / "ffhq-dit-b" / "001"),
    ]  # fmt: skip
    assert len(commands.given) == 3
    cells = results(out)
    assert cells["table2/ffhq-base"]["ours"] == {"fid": 6.0}
    assert cells["table2/ffhq-dmp"]["ours"] == {"fid": 5.1}
    assert cells["table2/ffhq-dmp"]["reported"] == {"fid": 5.87}
    assert cells["table2/ffhq-dmp"]["against_base"]["fid"]["low"] == pytest.approx(-1.4)
    assert cells["table4a/linear"]["ours"] == {"fid": 5.1}  # the same run
    assert cells["table2/ffhq-prompt"]["ours"] is None
    text = (out / "paper.md").read_text(encoding="utf-8")
    assert cells["table2/ffhq-dmp"]["ours_minus_reported"] == {"fid": pytest.approx(-0.77)}
    assert cells["table2/ffhq-prompt"]["ours_minus_reported"] is None
    assert "| dmp | 30000 | 5.87 | 5.10 | -0.77 | -0.90 [-1.40, -0.40] | 50000 |" in text
    assert "| ffhq-prompt | ffhq-dit-b | prompt | 30000 | 6.81 | - | - | - | - |  |" in text
    assert "| random | ffhq-dit-b | dmp | 30000 | *not found* | - | - | - | - | the " in text


def test_what_is_there_is_not_done_again_and_more_steps_go_on(
    tmp_path: Path, commands: Commands, place: list[str]
) -> None:
    out = tmp_path / "out"
    assert main(["table3", *place, "--only", "dmp-30k"]) == 0
    assert main(["table3", *place, "--only", "dmp-30k"]) == 0
    assert len(commands.given) == 2
    folder = out / "runs" / "ffhq-dit-l-dmp"
    # Every file under the name of its step, and one state to go on from.
    names = [f"ffhq-dit-l-dmp-step{step:08d}" for step in (10000, 20000, 30000)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{n}.safetensors" for n in names] + [f"{n}-gate.png" for n in names]
        + [f"{names[-1]}-state"]
    )  # fmt: skip
    assert main(["table3", *place, "--only", "dmp-20k", "--only", "dmp-50k"]) == 0
    assert commands.given[2][-2:] == ["--resume", "latest"]
    config = parse_arguments(["--config_file", str(out / "configs" / "ffhq-dit-l-dmp.toml")])
    assert config.max_train_steps == 50000
    # Only what is new is evaluated, beside the same base.
    models = [word for word in commands.given[3] if "=" in word]
    assert [word.split("=")[0] for word in models] == [
        "ffhq-dit-l-dmp-step20000", "ffhq-dit-l-dmp-step50000",
    ]  # fmt: skip
    assert commands.given[3][-1] == str(out / "evaluations" / "ffhq-dit-l" / "002")
    assert results(out)["table3/dmp-30k"]["ours"] == {"fid": 5.0}


def test_a_kill_between_state_and_file_loses_the_last_part_only(
    tmp_path: Path, commands: Commands, place: list[str]
) -> None:
    folder = tmp_path / "out" / "runs" / "ffhq-dit-b-dmp"
    for step in (20000, 30000):
        state = state_folder(folder, "ffhq-dit-b-dmp", step)
        state.mkdir(parents=True)
        (state / "state.json").write_text("{}", encoding="utf-8")
    assert main(["table2", *place, "--only", "ffhq-dmp"]) == 0
    assert commands.given[0][-2:] == ["--resume", "latest"]


def test_other_options_are_refused_in_the_same_folder(
    commands: Commands, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table3", *place, "--only", "dmp-10k"]) == 0
    changed = ["--set", "learning_rate=0.5", "max_data_loader_n_workers=2"]
    assert main(["table3", *place, "--only", "dmp-50k", *changed]) == 1
    error = capsys.readouterr().err
    assert "found learning_rate 0.0001 (now 0.5): give the same options" in error
    assert len(commands.given) == 2


def test_a_failing_command_ends_the_table(
    tmp_path: Path, commands: Commands, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    commands.code = 3
    assert main(["table2", *place]) == 1
    assert "found exit code 3" in capsys.readouterr().err
    assert len(commands.given) == 1
    commands.code = 0
    assert main(["table2", *place, "--only", "ffhq-base"]) == 1
    assert "expected a trained cell besides table2/ffhq-base" in capsys.readouterr().err


def test_dry_run_prints_and_runs_nothing(
    tmp_path: Path, commands: Commands, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table4d", *place, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert commands.given == []
    assert printed.count("train_dmp.py") == 2
    assert printed.count("evaluate.py") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["configs"]
    text = (tmp_path / "out/configs/ffhq-dit-b-dmp-mix-prepend.toml").read_text(encoding="utf-8")
    assert 'mix = "prepend"' in text


def test_scratch_begins_with_random_weights(
    tmp_path: Path, commands: Commands, place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(untrained, "make_untrained", lambda *given: made.append(given))
    assert main(["scratch", *place, "--only", "full-100k", "--only", "joint-100k"]) == 0
    folder = tmp_path / "out" / "untrained" / "ffhq-dit-b-untrained"
    assert made[0] == ("dit-b/2", Untrained(schedule="cosine"), folder)
    joint = tmp_path / "out/runs/ffhq-dit-b-untrained-joint"
    label = "ffhq-dit-b-untrained-joint-step100000"
    file = joint / label.replace("100000", "00100000")
    assert f"{label}=joint:{file}" in commands.given[-1]


def untrained_base(folder: Path, kind: Untrained, **options: object) -> FrozenBase:
    base = FAMILIES["dit"].base.name  # small
    untrained.make_untrained(base, kind, folder / "base")
    chosen = {"base": base, "pretrained_model_name_or_path": str(folder / "base")}
    return load_frozen(resolve({**chosen, "vae": str(tiny_vae(folder)), **options}))


def test_random_weights_are_a_base(tmp_path: Path) -> None:
    frozen = untrained_base(tmp_path, Untrained(schedule="cosine"))
    assert frozen.conditioning == "none"
    assert frozen.learns_sigma
    assert frozen.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    labels, t = torch.zeros(1, dtype=torch.long), torch.tensor([5])
    out = frozen.model(torch.randn(1, 4, 32, 32), t, class_labels=labels).sample
    assert out.shape == (1, 8, 32, 32)
    assert not out.any()  # as the original begins


def test_random_weights_with_text(tmp_path: Path, folders: Folders) -> None:
    text = str(folders("sd15"))
    kind = Untrained(text=12, schedule="linear")
    frozen = untrained_base(tmp_path, kind, text_conditional=True, text_encoder=text)
    assert frozen.conditioning == "caption"
    assert frozen.scheduler.config.beta_schedule == "linear"


def tiny_vae(folder: Path) -> Path:
    import diffusers

    path = folder / "vae"
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(path)
    return path


def test_figures(tmp_path: Path, commands: Commands, place: list[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["table4e", *place]) == 0
    assert (out / "figures" / "table4e.png").read_bytes().startswith(b"\x89PNG")
    cells = results(out)
    assert [cells[f"table4e/{n}"]["x"] for n in (0, 1, 6, 12)] == [0, 1, 6, 12]
    assert cells["table4e/12"]["ours"] == cells["table2/ffhq-dmp"]["ours"]
    assert main(["collect", str(out)]) == 0
    assert (out / "figures" / "figure1.png").exists()


def test_lines_begin_at_the_base() -> None:
    cells = [
        {"id": "base", "method": "base", "x": 0.0},
        {"id": "b", "method": "dmp", "x": 2.0},
        {"id": "a", "method": "dmp", "x": 1.0},
        {"id": "c", "method": "full", "x": 1.0},
    ]
    series = figures._series(cells)
    assert {name: [c["id"] for c in members] for name, members in series.items()} == {
        "dmp": ["base", "a", "b"], "full": ["base", "c"],
    }  # fmt: skip


def test_gates_are_put_together(tmp_path: Path, commands: Commands, place: list[str]) -> None:
    assert main(["figure4", *place, "--only", "ffhq"]) == 0
    assert len(commands.given) == 1  # nothing is evaluated
    assert (tmp_path / "out/figures/figure4-ffhq.png").read_bytes() == b"30000"


def test_samples_are_put_side_by_side(
    tmp_path: Path, commands: Commands, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "ffhq-base", "--only", "ffhq-prompt", "--only", "ffhq-dmp"]
    assert main(["figure5", *place, *only, "--evaluate", "samples=10000"]) == 0
    command = commands.given[-1]
    assert len(commands.given) == 3  # two runs, and one evaluation of both
    assert [word.split("=")[0] for word in command if "=" in word] == [
        "ffhq-dit-b-prompt-step30000", "ffhq-dit-b-dmp-step30000",
    ]  # fmt: skip
    assert command[command.index("--samples") + 1] == "8"  # a picture needs no more
    assert command[command.index("--metrics") + 1] == "none"
    folder = tmp_path / "out"
    assert (folder / "figures/figure5-ffhq-dit-b.png").read_bytes() == b"samples"
    assert not (folder / "evaluations").exists()  # it is no value of a table
    assert main(["figure5", *place, *only]) == 0
    assert len(commands.given) == 3
    assert main(["figure5", *place, "--only", "ffhq-base"]) == 1
    assert "expected a trained cell besides figure5/ffhq-base" in capsys.readouterr().err


def test_of_several_evaluations_the_largest_counts(tmp_path: Path) -> None:
    for number, (fid, samples) in enumerate([(5.0, 50000), (7.0, 100), (6.0, 50000)]):
        report(tmp_path / "evaluations" / "a" / f"{number:03d}", {"base": fid}, samples)
    assert read_results(tmp_path)["a", "base"].metrics == {"fid": 6.0}


@pytest.mark.parametrize("text", ["no json", '{"format": 2}', '{"format": 1, "models": []}'])
def test_bad_evaluations(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "a" / "001"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    with pytest.raises(PatchError, match="expected an evaluation of format 1 at"):
        read_results(tmp_path)
