"""What a run's command line is told before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from dmp_common import PatchError, get_base
from training.base.families import table
from training.base.releases import require_releases
from training.objective import base_checks
from training.options.command_line import Resolved, parse_arguments, read_options
from training.run import checking, optimisers
from training.run.checking import check_run
from training.train_dmp import main


def checked(tmp_path: Path, **options: object) -> Resolved:
    defaults = {"base": "digits", "output_dir": str(tmp_path / "out")}
    found = read_options({**defaults, **options})
    check_run(found)
    return found


def test_problems_of_every_part_are_one_report(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a --q 1\nb --w x\n")
    dataset = tmp_path / "d.toml"
    dataset.write_text("[[datasets]]\nquantum = 1\n")
    (tmp_path / "file").write_text("in the way")
    found = checked(
        tmp_path, quantum=1, dmp_sites="nowhere", optimizer_args=["x"], resume="latest",
        sample_prompts=str(prompts), dataset_config=str(dataset), train_data_dir="nowhere",
        webdataset="nowhere.tar",
        output_dir=str(tmp_path / "file"), pretrained_model_name_or_path="./none",
    )  # fmt: skip
    report = "\n".join(found.problems)
    for part in (
        "--quantum", "'nowhere'", "one source of data", "folder of images at nowhere",
        "unknown key quantum", "line 1", "line 2", "--output_dir", "--optimizer_args", "--resume",
        "check --pretrained_model_name_or_path",
    ):  # fmt: skip
        assert part in report
    assert len(set(found.problems)) == len(found.problems)


def test_a_good_line_has_no_problems(tmp_path: Path) -> None:
    found = checked(tmp_path)
    assert (found.problems, found.warnings) == ([], [])


def test_a_base_that_cannot_be_trained_is_refused_before_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And told with all other problems."""
    monkeypatch.setattr(diffusers, "__version__", "0.35.9")
    line = ["--base", "chroma", "--train_data_dir", "nowhere", "--output_dir", str(tmp_path)]
    assert main(line) == 1
    said = capsys.readouterr()
    assert "recipe" not in said.out
    assert "expected diffusers 0.36 or later for base chroma, found 0.35.9: pip" in said.err
    assert "a folder of images at nowhere" in said.err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "--base sd15 --frames 81 --expert high --resolution 500",
            ["expected --frames 1 with base sd15", "expert", "multiples of 64"],
        ),
        ("--base wan-1.3b --frames 80", ["one and a multiple of 4", "the nearest is 81"]),
        (
            "--base wan22-i2v-14b --state_captions nowhere --min_snr_gamma 5",
            ["two experts", "expected --frames with base", "--state_captions", "--min_snr_gamma"],
        ),
        ("--base sd15 --first_frames", ["with --first_frames, found sd15"]),
        (
            "--base z-image --teacher_guidance_scale 4 --objective distill --own_sampler ddim",
            ["expected weights that draw with guidance for --teacher_guidance_scale"],
        ),
        (
            "--base flux --objective own --own_sampler ddim --v_parameterization --fp8_base "
            "--method lora --network_min_dim 2",
            [
                "expected sampler euler for a flow model, found ddim: leave out --own_sampler",
                "--v_parameterization",
                "--network_min_dim, found flux",
                "--fp8_base",
            ],
        ),
        (
            "--base sdxl --objective distill --student_quantization rtn3 --states teacher "
            "--t5xxl nowhere --sample_at_first --network_weights nowhere.safetensors",
            ["that base sdxl has", "a text file with one prompt a line", "nowhere.safetensors"],
        ),
        ("--base sd15 --dmp_sites nowhere --relative_loss --loss_type l1", ["loss_type l2"]),
    ],
)
def test_all_that_the_options_show_is_told_before_anything_is_loaded_or_asked_for(
    line: str,
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    for cls in (diffusers.DiffusionPipeline, diffusers.UNet2DConditionModel):
        monkeypatch.setattr(cls, "load_config", asked)
    monkeypatch.setattr("training.run.trainer.open_run", asked)
    assert main([*line.split(), "--train_data_dir", "nodata", "--output_dir", str(tmp_path)]) == 1
    found = capsys.readouterr().err
    for part in [*told, "a folder of images at nodata"]:
        assert part in found


def test_guidance_is_learned_of_z_image_and_not_of_turbo(tmp_path: Path) -> None:
    data = {"dataset_name": "digits", "recipe": "guidance", "base": "z-image"}
    turbo = checked(tmp_path, **data)
    assert "such as Z-Image" in turbo.problems[0]
    whole = checked(tmp_path, **data, pretrained_model_name_or_path="Tongyi-MAI/Z-Image")
    assert whole.problems == [] and whole.config.guidance_range == (1.0, 5.0)


def test_packages_that_options_ask_for_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_checks.importlib.util, "find_spec", lambda name: None)
    found = checked(tmp_path, method="lora", objective="distill", student_quantization="q4_0")
    assert any("the package peft for --method lora" in problem for problem in found.problems)
    assert any("gguf for --student_quantization q4_0" in problem for problem in found.problems)


def test_prompts_that_a_base_does_not_take(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --l 4\na dog --i nothing.png\n", encoding="utf-8")
    for base, told in {
        "z-image": [
            "line 1: expected a guidance scale of 1 for the distilled",
            "line 2: expected no",
        ],
        "wan21-i2v-14b": ["line 1: expected a picture", "line 2: expected a picture for --i"],
    }.items():
        found = checked(tmp_path, base=base, sample_prompts=str(prompts))
        assert all(any(part in problem for problem in found.problems) for part in told)


def test_a_text_encoder_that_transformers_does_not_know_is_named() -> None:
    family = replace(table.LUMINA2, encoders={"text_encoder": "Gemma9Model"})
    with pytest.raises(PatchError, match="transformers with Gemma9Model for base lumina2, found"):
        require_releases(get_base("lumina2"), family)


def test_a_cpu_takes_bf16_and_plain_optimisers(tmp_path: Path) -> None:
    found = checked(tmp_path, cpu=True, mixed_precision="fp16", optimizer_type="adamw8bit")
    assert (found.config.mixed_precision, found.config.optimizer_type) == ("bf16", "AdamW")
    assert found.problems == []
    assert "fp16 becomes bf16" in found.warnings[0]
    assert "AdamW8bit becomes AdamW, because there is no GPU" in found.warnings[1]


def test_an_8bit_optimiser_without_its_package_becomes_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(checking, "has_package", lambda name: False)
    found = checked(tmp_path, mixed_precision="fp16", optimizer_type="PagedAdamW8bit")
    assert (found.config.mixed_precision, found.config.optimizer_type) == ("fp16", "AdamW")
    assert "because the package bitsandbytes is not installed" in found.warnings[0]
    assert optimisers.has_package("AdamW")


def test_every_plain_optimiser_is_known() -> None:
    assert {*optimisers.PLAIN, *optimisers.PLAIN.values()} <= set(optimisers.OPTIMISERS)


def test_base_auto_is_recognised_and_takes_its_recipe(tmp_path: Path, digits_base: Path) -> None:
    found = checked(
        tmp_path, base="auto", pretrained_model_name_or_path=str(digits_base), dataset_name="digits"
    )
    assert found.config.base == "tiny-digits"
    assert found.problems == []
    unknown = checked(tmp_path, base="auto", pretrained_model_name_or_path=str(tmp_path))
    assert any("expected data" in problem for problem in unknown.problems)
    assert len(unknown.problems) == 2


def test_a_recipes_batch_is_rounded_to_what_processes_take() -> None:
    """--train_batch_size 3 does not divide the recipe's 128; asked for, 128 stays an error."""
    from dmp_common import PatchError
    from training.run.scale import accumulation

    config = read_options({"base": "sd15", "recipe": "paper", "train_batch_size": 3}).config
    assert accumulation(config, 1) == 43
    assert accumulation(config, 100) == 1
    asked = read_options({"base": "sd15", "train_batch_size": 3, "global_batch_size": 128}).config
    with pytest.raises(PatchError, match="multiple of 3"):
        accumulation(asked, 1)


def test_a_sampler_that_previews_lack_is_a_warning(tmp_path: Path) -> None:
    found = checked(tmp_path, sample_sampler="heun")
    assert (found.config.sample_sampler, found.problems) == (None, [])
    assert "--sample_sampler heun" in found.warnings[0]
    for name in ("ddim", "k_euler", "dpmsolver++"):
        found = checked(tmp_path, sample_sampler=name)
        assert (found.config.sample_sampler, found.warnings) == (name, [])


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("sdxl", {"clip_skip": 2, "weighting_scheme": "logit_normal"}),
        ("flux", {"clip_skip": 1, "max_token_length": 225}),
        ("sd15", {"discrete_flow_shift": 3.0, "guidance_scale": 3.5, "t5_max_token_length": 128}),
    ],
)
def test_options_for_other_bases_are_a_warning_and_not_recorded(
    base: str, options: dict[str, object], tmp_path: Path
) -> None:
    found = checked(tmp_path, base=base, dataset_name="digits", **options)
    assert found.problems == []
    assert (
        found.config.recorded()
        == checked(tmp_path, base=base, dataset_name="digits").config.recorded()
    )
    names = {name.replace("guidance_scale", "flux_guidance_scale") for name in options}
    assert f"without effect on base {base}: " in found.warnings[0]
    assert all(f"--{name}" in found.warnings[0] for name in names)


def test_options_that_fit_a_base_are_kept(tmp_path: Path) -> None:
    for base, options in {
        "sd15": {"clip_skip": 2, "max_token_length": 225},
        "flux": {"guidance_scale": 3.5, "timestep_sampling": "shift", "t5_max_token_length": 99},
    }.items():
        assert checked(tmp_path, base=base, dataset_name="digits", **options).warnings == []


def test_a_refused_command_line_leaves_no_folder(tmp_path: Path) -> None:
    assert checked(tmp_path, output_dir=str(tmp_path / "a" / "b"), dmp_sites="none").problems
    assert list(tmp_path.iterdir()) == []


def test_who_names_nothing_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([], check_run)
    told = capsys.readouterr().err
    assert told.startswith("error: expected --base with the model to patch")
    assert told.count("Three commands that run") == 1
