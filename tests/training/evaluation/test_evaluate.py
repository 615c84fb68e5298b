"""The command from end to end: on the bundled digits, and on tiny bases of other families."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from dmp_common import Patch
from tests.randomness import randomise
from tests.tiny import FAMILIES
from tests.training.conftest import Folders
from tests.training.tinybases import OPTIONS, TRAINED
from training.evaluate import main
from training.train_dmp import main as train

ROOT = Path(__file__).resolve().parents[3]
QUICK = [
    *("--images", "12", "--loss_bins", "2", "--loss_draws", "1", "--samples", "14"),
    *("--sample_steps", "2", "--kid_subset_size", "10", "--kid_subsets", "4"),
    *("--bootstrap_draws", "20", "--grid", "3", "--batch_size", "8"),
]


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A patch, its second seed, and the three controls, trained for one step each."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for method, seed in (("dmp", 0), ("dmp", 1), ("prompt", 0), ("lora", 0), ("full", 0)):
        name = f"{method}{seed}"
        line = [
            *("--base", "digits", "--method", method, "--seed", str(seed), "--output_name", name),
            *("--max_train_steps", "1", "--lr_warmup_steps", "0", "--train_batch_size", "4"),
            *("--no-keep_best", "--report_samples", "0", "--validate_every_n_steps", "0"),
            *("--validation_split", "0", "--no-relative_loss", "--output_dir", str(folder)),
        ]
        assert train(line) == 0
        ending = "" if method == "full" else ".safetensors"
        found[name] = folder / f"{name}{ending}"
    return found


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def test_digits_with_all_controls(digits_models: dict[str, Path], tmp_path: Path) -> None:
    kinds = {
        "ours": ["dmp0", "dmp1"], "prompts": ["prompt0"], "LoRA": ["lora0"], "full": ["full0"],
    }  # fmt: skip
    models = [
        f"--model={label}={name[:-1]}:{digits_models[name]}"
        for label, names in kinds.items()
        for name in names
    ]
    out = tmp_path / "out"
    assert main(["--base", "digits", *models, *QUICK, "--require_controls", "--out", str(out)]) == 0
    data = read(out)
    assert set(data) == {
        "format", "base", "reference", "settings", "missing_controls", "models", "differences",
        "primary",
    }  # fmt: skip
    assert (data["format"], data["base"], data["missing_controls"]) == (1, "digits", [])
    assert list(data["models"]) == ["base", *kinds]
    base = data["models"]["base"]
    assert (base["method"], base["parameters"], base["samples"]) == ("base", 584900, 14)
    assert set(base["metrics"]) == {
        "fid", "kid", "kid_std", "precision", "recall", "class_accuracy",
    }  # fmt: skip
    assert (base["bytes"], base["bytes_added"], base["to_full"]) == (2 * 584900, 0, {})
    assert base["loss"] == pytest.approx(sum(base["loss_by_bin"]) / 2)
    ours = data["models"]["ours"]
    assert ours["files"] == [str(digits_models[name]) for name in ("dmp0", "dmp1")]
    assert ours["trained"] == {"learning_rate": 0.0003, "ema_decay": 0.99, "steps": 1}
    assert (ours["parameters"], ours["bytes_added"]) == (6408, 2 * 6408)
    assert ours["loss"] != base["loss"]
    assert data["settings"]["not_computed"].keys() == {"sfid", "clip_score"}
    differences = {(d["model"], d["against"], d["measure"], d["over"]): d
                   for d in data["differences"]}  # fmt: skip
    for against in ("base", "prompts", "LoRA", "full"):
        found = differences["ours", against, "loss", "images"]
        assert found["low"] <= found["mean"] <= found["high"]
        assert found["n"] == 12
        other = data["models"][against]
        assert found["mean"] == pytest.approx(ours["loss"] - other["loss"], abs=1e-12)
        assert differences["ours", against, "fid", "samples"]["n"] == 14
        assert differences["ours", against, "fid", "seeds"]["n"] == 2
        assert ("ours", against, "loss_bin_1", "images") in differences
    assert not [d for d in data["differences"] if d["over"] == "seeds" and d["model"] != "ours"]
    primary = data["primary"]
    assert [one["against"] for one in primary] == ["base", "prompts", "LoRA", "full"]
    assert {(one["model"], one["measure"]) for one in primary} == {("ours", "fid")}
    assert all(one["p"] <= one["p_holm"] <= 1 for one in primary)
    over_seeds = differences["ours", "base", "fid", "seeds"]
    assert primary[0]["difference"] == {n: over_seeds[n] for n in ("mean", "low", "high")}
    text = (out / "evaluation.md").read_text(encoding="utf-8")
    assert "Controls are missing" not in text
    assert text.index("## Primary comparisons") < text.index("## Differences")
    assert "sFID was not computed: the feature extractor" in text
    for name in ("loss_by_bin.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 200
            assert len(picture.convert("L").getcolors(1 << 16) or []) > 2


def test_repairs_are_judged_beside_the_full_model(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    patch = digits_models["dmp0"]
    rows = {
        "patch": f"dmp:{patch}@strength=30",
        "other steps": f"dmp:{patch}@strength=30,steps=3,guidance=2,sampler=unipc,epsilon=1.05",
        "more bits": "base:@quantization=rtn6-group32",
        "tuned": "exact:@epsilon=tune",
    }
    models = [f"--model={label}={text}" for label, text in rows.items()]
    line = ["--base", "digits", "--student_quantization", "rtn2-group32", *models, *QUICK]
    more = ["--metrics", "fid,class_accuracy", "--epsilon_samples", "4", "--out", str(tmp_path)]
    assert main([*line, *more]) == 0
    data = read(tmp_path)
    found, cheap = data["models"], "cheap model as it is"
    assert list(found) == ["full model", cheap, *rows]
    assert data["reference"] == cheap and data["missing_controls"] == ["prompt", "lora"]
    # The full model is its own target.
    assert found["full model"]["metrics"]["distance_to_full"] == 0
    assert found["full model"]["to_full"] == {}
    damage = found[cheap]["to_full"]
    assert damage["pixels"]["mean"] > 0.01 and damage["pixels"]["gone"] is None
    patched = found["patch"]["to_full"]["pixels"]
    share = 1 - patched["mean"] / damage["pixels"]["mean"]
    assert patched["gone"]["mean"] == pytest.approx(share) and share != 0
    assert patched["gone"]["low"] < share < patched["gone"]["high"]
    assert (patched["gone"]["of"], patched["gone"]["seeds"]) == (cheap, None)
    # No plain row is sampled like this one.
    assert found["other steps"]["to_full"]["pixels"]["gone"] is None
    assert found["other steps"]["evaluations_per_picture"] == 6
    assert found["patch"]["evaluations_per_picture"] == 2
    assert found["more bits"]["to_full"]["pixels"]["mean"] < damage["pixels"]["mean"]
    assert found["more bits"]["bytes"] > found[cheap]["bytes"]
    assert found["patch"]["bytes"] == found[cheap]["bytes"] + 2 * 6408
    losses = {label: model["loss"] for label, model in found.items()}
    assert losses["tuned"] == losses["full model"] != losses[cheap] != losses["patch"]
    assert losses["other steps"] == losses["patch"]  # samples differ alone
    assert found["other steps"]["sampling"]["epsilon_scale"] == [1.05]
    sampling = found["tuned"]["sampling"]
    (tried,) = sampling["epsilon_tried"]
    (chosen,) = sampling["epsilon_scale"]
    assert min(tried, key=lambda text: tried[text]) == f"{chosen:g}" and len(tried) >= 4
    measures = {(d["model"], d["against"], d["measure"]) for d in data["differences"]}
    for against in ("full model", cheap, "more bits", "tuned"):
        assert ("patch", against, "distance_to_full") in measures
        assert ("patch", against, "class_accuracy") in measures
    assert ("full model", cheap, "fid") in measures
    assert ("more bits", "full model", "fid") not in measures
    assert data["primary"] == []  # one seed says nothing of a method
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert text.index("How far each picture") < text.index("held-out loss")
    assert "- tuned: epsilon scale" in text and "to the validation images." in text


def test_missing_controls_are_said_first(
    digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"--model=ours=dmp:{digits_models['dmp0']}"
    line = ["--base", "digits", model, *QUICK, "--samples", "0", "--out", str(tmp_path)]
    assert main([*line, "--require_controls"]) == 1
    assert "expected every control" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()
    assert main(line) == 0
    first = read(tmp_path)
    assert first["missing_controls"] == ["prompt", "lora", "full"]
    assert first["models"]["base"]["metrics"] == {}
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8").splitlines()
    assert text[2].startswith("**Controls are missing: prompt tuning")
    # The same seeds give the same figures; a smaller batch changes nothing but rounding.
    assert main([*line, "--batch_size", "5"]) == 0
    again = read(tmp_path)
    for label in ("base", "ours"):
        assert again["models"][label]["loss"] == pytest.approx(first["models"][label]["loss"])
    assert main([*line, "--seed", "1"]) == 0
    assert read(tmp_path)["models"]["base"]["loss"] != first["models"]["base"]["loss"]


class Colours(nn.Module):
    """Features (B, 12) and a map."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = nn.functional.adaptive_avg_pool2d(images, 2)
        return small.flatten(1), small


def make_colours() -> nn.Module:
    return Colours()


def make_clip(folder: Path, base: Path) -> Path:
    """A tiny CLIP with the tokenizer of a tiny base."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    shared = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    text = {**shared, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**shared, "image_size": 16, "patch_size": 8},
        projection_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def evaluate_tiny(name: str, folders: Folders, out: Path, *more: str) -> dict[str, Any]:
    tiny = FAMILIES[name]
    path = out / "patch.safetensors"
    randomise(Patch.create(tiny.base), 0, 0.1).save(path)
    data = folders("classes" if name == "dit" else "pictures")
    line = [
        *("--base", tiny.base.name, "--pretrained_model_name_or_path", str(folders(name))),
        *("--resolution", "16", "--train_data_dir", str(data), *OPTIONS.get(name, [])),
        *("--model", f"ours=dmp:{path}", "--out", str(out)),
        *("--loss_bins", "2", "--loss_draws", "1", "--sample_steps", "2", "--batch_size", "4"),
    ]
    assert main([*line, *more]) == 0
    return read(out)


def test_captions_have_a_clip_score(folders: Folders, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip", folders("sd15"))
    data = evaluate_tiny(
        "sd15", folders, tmp_path, "--samples", "8", "--clip", str(clip), "--bootstrap_draws",
        "20", "--feature_extractor", f"{__name__}:make_colours", "--kid_subset_size", "4",
        "--guidance_scale", "2",
    )  # fmt: skip
    assert data["settings"]["not_computed"] == {"class_accuracy": "base tiny-sd15 takes no classes"}
    for model in data["models"].values():
        assert set(model["metrics"]) == {
            "fid", "sfid", "kid", "kid_std", "precision", "recall", "clip_score",
        }  # fmt: skip
        assert 0 <= model["metrics"]["clip_score"] <= 100
    over = {d["measure"]: d["over"] for d in data["differences"]}
    assert over["clip_score"] == over["sfid"] == "samples"
    assert data["models"]["ours"]["loss"] != data["models"]["base"]["loss"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_family(name: str, folders: Folders, tmp_path: Path) -> None:
    data = evaluate_tiny(
        name, folders, tmp_path, "--samples", "3", "--metrics", "none", "--images", "4"
    )
    assert data["models"]["ours"]["samples"] == 3
    assert data["models"]["ours"]["loss"] != data["models"]["base"]["loss"]
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "a=dmp:nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "a=what:b"], "LABEL=KIND:PATH"),
        (["--base", "sd99", "--model", "a=dmp:b"], "nowhere"),
        (["--base", "dit-b/2", "--model", "{dmp0}"], "expected held-out images"),
        (["--model", "{dmp0}", "--model", "{dmp0}"], "twice"),
        (["--model", "{dmp0}", "--model", "{prompt0}"], "expected one kind for label"),
        (["--model", "{dmp0}", "--sampler", "magic"], "expected a sampler"),
        (["--model", "{dmp0}", "--model", "b=base:@sampler=magic"], "expected a sampler"),
        (["--model", "{dmp0}", "--classifier", "nowhere"], "as --classifier, found 'nowhere'"),
        (["--model", "{dmp0}", "--inception_weights", "nowhere"], "check --inception_weights"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    digits_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: f"a={name[:-1]}:{path}" for name, path in digits_models.items()}
    line = [part.format(**places) if part.startswith("{") else part for part in arguments]
    if "sd99" in line:
        message = "known bases"
    base = [] if "--base" in line else ["--base", "digits"]
    assert main(["--out", str(tmp_path / "out"), *base, *line]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model"),
        (["--model", "a=dmp:b", "--metrics", "fid,magic"], "found magic"),
        (["--model", "a=dmp:b", "--samples", "-1"], "--samples"),
        (["--model", "a=dmp:b", "--epsilon_scale", "much"], "a positive number such as 1.01"),
        (["--model", "a=dmp:b", "--guidance", "1"], "did you mean --guidance_scale?"),
    ],
)
def test_wrong_options_name_the_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--base", "digits", *arguments])
    assert message in capsys.readouterr().err


def test_missing_packages_are_found_before_the_work(
    digits_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else found(name)
    )
    line = ["--base", "digits", "--model", f"a=dmp:{digits_models['dmp0']}", "--out", str(tmp_path)]
    assert main(line) == 1
    assert "found no torchmetrics" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_script_runs_from_any_folder(tmp_path: Path) -> None:
    script = ROOT / "training" / "evaluate.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--inception_weights" in done.stdout
