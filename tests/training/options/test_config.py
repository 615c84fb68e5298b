"""The command line: presets, readable errors, nothing silently ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from training.options.command_line import parse_arguments, resolve, with_base
from training.options.config import TrainConfig
from training.options.presets import PRESETS


def test_command_line_beats_preset_beats_default() -> None:
    plain = parse_arguments(["--base", "digits"])
    assert plain.learning_rate == PRESETS["digits"]["learning_rate"]
    assert plain.max_grad_norm == TrainConfig.model_fields["max_grad_norm"].default
    assert parse_arguments(["--base", "digits", "--learning_rate", "0.5"]).learning_rate == 0.5


def test_presets_are_valid() -> None:
    for base, preset in PRESETS.items():
        assert TrainConfig(base=base, **preset).base == base


def test_a_base_has_its_variant_for_dmp_alone() -> None:
    def found(*arguments: str) -> tuple[int, int, bool]:
        config = parse_arguments(list(arguments))
        return config.grids, config.max_timestep, config.relative_loss

    assert found("--base", "digits") == found("--base", "sd15", "--recipe", "stages")
    assert found("--base", "digits") == (4, 1000, True)
    cifar = ("--base", "cifar10-s", "--train_data_dir", "x")
    assert found(*cifar) == (4, 500, False)
    assert found(*cifar, "--recipe", "paper") == (1, 1000, False)
    assert found("--base", "digits", "--recipe", "clean") == (4, 500, False)
    for method in ("prompt", "lora", "full", "joint"):
        assert found("--base", "digits", "--method", method) == (1, 1000, False)


def test_names_take_the_base() -> None:
    config = TrainConfig(base="dit-b/2")
    assert config.output_dir == "output/dit-b-2"
    assert config.output_name == "dit-b-2-dmp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", "1"], "did you mean --learning_rate?"),
        (["--quantum_flux", "1"], "unknown option --quantum_flux: see --help all"),
        (["--learning_rate", "-1"], "--learning_rate: expected a number above 0, found '-1'."),
        (["--max_train_steps", "many"], "expected a whole number, found 'many'"),
        (["--gate", "quantum"], "expected one of linear, attention or none, found 'quantum'"),
        (["stray"], "'stray'"),
        (["--dmp_depth", "2", "--dmp_sites", "all"], "give one of them"),
        (["--learning", "1"], "unknown option --learning"),  # no silent abbreviations
        (["--min_snr_gamma", "5", "--p2_gamma", "1"], "exclude each other"),
        (["--max_token_length", "100"], "expected one of 75, 150 or 225, found '100'"),
        (["--min_timestep", "500", "--max_timestep", "400"], "must be below"),
        (["--config_file", "nowhere.toml"], "nowhere.toml: expected a TOML file"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--base", "digits", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help", "all"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, info in TrainConfig.model_fields.items():
        assert f"--{name}" in printed.replace(",", " ").split()
        text = str(info.description)
        assert text[0].isupper() or text.split()[0].islower(), name  # a value of the option
        assert text.endswith(".") and "%%" not in text and "  " not in text, name


def test_sites_and_variant() -> None:
    def variant(**options: object) -> dict[str, object]:
        return resolve({"base": "sd15", **options}).variant

    assert "sites" not in variant()
    assert variant(dmp_depth=3)["sites"] == 3
    assert variant(dmp_sites="all")["sites"] == "all"
    assert variant(dmp_sites="block.1")["sites"] == ["block.1"]
    assert variant(dmp_sites="mid,in.1")["sites"] == ["mid", "in.1"]
    assert variant(grid=8)["grid"] == 8


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_toml_is_between_command_line_and_recipe_and_preset(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.toml",
        'base = "digits"\nrecipe = "paper"\n'
        "[optimisation]\nweight_decay = 0.5\nmax_train_steps = 7\n"
        '[data]\nflip_aug = true\noptimizer_args = ["betas=(0.9,0.99)"]\n',
    )
    config = parse_arguments(["--config_file", file, "--max_train_steps", "3", "--no-flip_aug"])
    assert config.max_train_steps == 3  # command line
    assert config.weight_decay == 0.5  # file, not the recipe's 0
    assert config.learning_rate == 1e-4  # recipe, not the preset's 3e-4
    assert config.lr_warmup_steps == 0
    assert config.train_batch_size == PRESETS["digits"]["train_batch_size"]  # preset
    assert config.flip_aug is False
    assert config.optimizer_args == ["betas=(0.9,0.99)"]
    assert parse_arguments(["--config_file", file[: -len(".toml")]]).weight_decay == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate = 1", "did you mean --learning_rate?"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "seed is given twice"),
        ("seed = ", "expected TOML, found"),
        ("seed = -1", "--seed: expected a number of at least 0, found -1."),
        ("reg_data_dir = 'reg'", "--reg_data_dir is not supported: a patch learns"),
    ],
)
def test_bad_toml(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--config_file", write(tmp_path / "run.toml", text)])
    assert message in capsys.readouterr().err


def test_resolved_configuration_is_written_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "resolved.toml"
    given = ["--base", "sd15", "--recipe", "paper", "--clip_skip", "2"]
    given += ["--train_data_dir", 'a "b"\\c']
    secret = ["--huggingface_token", "hf_secret"]
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*given, *secret, "--output_config", str(path)])
    assert caught.value.code == 0
    assert "hf_secret" not in path.read_text(encoding="utf-8")
    again = parse_arguments(["--config_file", str(path)])
    assert again.recorded() == parse_arguments(given).recorded()
    with pytest.raises(SystemExit):
        parse_arguments([*given, "--output_config", str(path)])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments([*given, "--output_config"])
    assert "clip_skip = 2" in capsys.readouterr().out


def test_other_data_take_the_place_of_the_bases_own() -> None:
    assert resolve({"base": "digits"}).dataset_name == "digits"
    config = resolve({"base": "digits", "train_data_dir": "photos"})
    assert (config.dataset_name, config.train_data_dir) == (None, "photos")


def test_auto_takes_the_preset_of_what_it_finds() -> None:
    given = {"train_data_dir": "x", "pretrained_model_name_or_path": "w.safetensors"}
    config = resolve({**given, "seed": 4, "output_dir": "o/{base}"})
    assert config.base == "auto"
    found = with_base(config, "sd15")
    assert (found.base, found.seed) == ("sd15", 4)
    assert found.train_batch_size == PRESETS["sd15"]["train_batch_size"]
    assert (found.output_dir, found.output_name) == ("o/sd15", "sd15-dmp")


def test_every_kohya_flag_of_the_guide_is_known() -> None:
    """The list of the task: kohya's names wherever kohya has the thing."""
    names = """pretrained_model_name_or_path vae no_half_vae train_data_dir dataset_config
    resolution enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
    caption_extension caption_dropout_rate shuffle_caption keep_tokens max_token_length clip_skip
    flip_aug random_crop cache_latents cache_latents_to_disk cache_text_encoder_outputs
    cache_text_encoder_outputs_to_disk mixed_precision gradient_checkpointing
    gradient_accumulation_steps optimizer_type optimizer_args learning_rate lr_scheduler
    lr_warmup_steps max_train_steps max_train_epochs train_batch_size max_data_loader_n_workers
    persistent_data_loader_workers max_grad_norm min_snr_gamma debiased_estimation_loss
    noise_offset v_parameterization zero_terminal_snr timestep_sampling weighting_scheme
    discrete_flow_shift logit_mean logit_std output_dir output_name save_every_n_steps
    save_every_n_epochs save_last_n_steps save_precision save_state resume sample_prompts
    sample_every_n_steps sample_at_first validation_split validate_every_n_steps log_with
    logging_dir seed network_weights config_file output_config huggingface_repo_id base recipe
    method dmp_sites dmp_depth gate importance_weight load_weight ema_decay webdataset dry_run"""
    assert not set(names.split()) - set(TrainConfig.model_fields)


def test_help_is_fast_since_it_imports_little() -> None:
    # The packages say it, seconds would be those of the machine.
    code = (
        "import sys\n"
        "from training.options.command_line import parse_arguments\n"
        "try: parse_arguments(['--help'])\n"
        "except SystemExit: pass\n"
        "print('PACKAGES', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = set(done.stdout.rpartition("PACKAGES")[2].split())
    assert "pydantic" in packages  # the list is one
    heavy = "torch numpy PIL safetensors diffusers transformers accelerate huggingface_hub tqdm"
    assert not packages & set(heavy.split())
