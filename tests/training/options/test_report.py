"""One report of everything: what is wrong, what has no effect, what kohya's names mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.options.command_line import parse_arguments, read_options, resolve
from training.options.config import TrainConfig
from training.options.hints import SYNONYMS, hint
from training.options.kohya import EFFECTLESS, MEANT, OF_LORA, REFUSED, SAME
from training.options.problems import ConfigError


def read(**options: Any) -> tuple[TrainConfig, list[str], list[str]]:
    found = read_options({"base": "sd15", **options})
    return found.config, found.problems, found.warnings


def test_all_problems_are_shown_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the command line and of its file, each once; the good options do not matter."""
    file = tmp_path / "run.toml"
    file.write_text("lerning_rate = 1\n[a]\nema_decay = 2\nreg_data_dir = 'reg'\n")
    line = "--base sd15 --seed many --gate magic --quantum 3 --min_snr_gamma 5 --p2_gamma 1 "
    line += f"--max_train_steps 7 --flip_aug maybe --config_file {file} -x"
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(line.split())
    printed = capsys.readouterr().err
    for part in (
        "found 9 problems", "'-x'", "--flip_aug is a switch", "did you mean --learning_rate?",
        "--ema_decay: expected a number below 1, found 2.", "--reg_data_dir is not supported",
        "--seed: expected a whole number, found 'many'", "--gate: expected one of linear",
        "unknown option --quantum", "--min_snr_gamma and --p2_gamma exclude each other",
    ):  # fmt: skip
        assert printed.count(part) == 1, part
    with pytest.raises(ConfigError) as caught:
        resolve({"base": "sd15", "seed": "many", "gate": "magic"})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["\ufeffseed = 3\n", "seed = 3\r\n"])
def test_byte_order_marks_and_line_ends_are_harmless(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode())
    assert resolve({"base": "sd15", "config_file": str(file)}).seed == 3


def test_options_without_effect_are_one_warning() -> None:
    options = {**dict.fromkeys(EFFECTLESS, "x"), **dict.fromkeys(OF_LORA, "x")}
    options |= {"network_dim": "8", "network_alpha": 4}
    config, problems, warnings = read(**options)
    assert (problems, len(warnings)) == ([], 1)
    assert all(f"--{name}" in warnings[0] for name in options)
    assert (config.network_dim, config.network_alpha) == (None, None)  # the file tells no lie
    assert config.recorded() == resolve({"base": "sd15"}).recorded()


def test_what_changes_the_result_is_refused_with_a_remedy() -> None:
    for name, remedy in REFUSED.items():
        _, problems, warnings = read(**{name: "x"})
        assert problems == [f"--{name} is not supported: {remedy}."]
        assert not warnings
    _, problems, _ = read(model_prediction_type="additive")
    assert problems == [
        "--model_prediction_type: expected raw, which flow models are trained on, found 'additive'."
    ]
    for name in OF_LORA:  # of a LoRA they would change the result
        assert len(read(method="lora", **{name: "x"})[1]) == 1
    assert read(method="lora", network_dim=8)[0].network_dim == 8


@pytest.mark.parametrize("off", [False, "", 0, "0", "false", []])
def test_an_option_that_is_off_is_harmless_whatever_it_is(off: object) -> None:
    names = [*EFFECTLESS, *OF_LORA, *REFUSED, *SAME, *MEANT, "network_dim"]
    assert read(**dict.fromkeys(names, off))[1:] == ([], [])
    _, problems, warnings = read(quantum=off)
    assert problems == []
    assert "--quantum (unknown, and switched off)" in warnings[0]


def test_off_values_of_our_options_mean_not_given() -> None:
    """As in the files of kohya's user interface, which name every option."""
    config, problems, warnings = read(
        vae="", min_snr_gamma=0, p2_gamma="0", max_train_epochs=0, save_every_n_epochs=0,
        vae_batch_size=0, clip_skip=0, learning_rate=0, unet_lr="3e-4", recipe="",
        caption_extension="", lr_scheduler_args=[], noise_offset=0,
    )  # fmt: skip
    assert problems == []
    assert config.recorded() == resolve({"base": "sd15", "learning_rate": 3e-4}).recorded()
    assert len(warnings) == 1
    assert all(f"--{name}" in warnings[0] for name in ("vae", "caption_extension"))
    assert "gamma" not in warnings[0]  # 0 is how it is switched off


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"unet_lr": "2e-4"}, {"learning_rate": 2e-4}),
        ({"unet_lr": "0.0002", "learning_rate": 2e-4}, {"learning_rate": 2e-4}),
        ({"guidance_scale": 1.5}, {"flux_guidance_scale": 1.5}),
        ({"training_shift": 3}, {"discrete_flow_shift": 3.0}),
        ({"use_8bit_adam": True}, {"optimizer_type": "AdamW8bit"}),
        ({"use_8bit_adam": True, "optimizer_type": "adamw8bit"}, {"optimizer_type": "adamw8bit"}),
        ({"use_lion_optimizer": True}, {"optimizer_type": "Lion"}),
        ({"base": "auto", "sdxl": True}, {"base": "sdxl"}),
        ({"weighting_scheme": "uniform"}, {"weighting_scheme": "none"}),
        ({"huggingface_repo_visibility": "private"}, {"huggingface_private": True}),
        ({"logging_dir": "logs"}, {"log_with": "tensorboard"}),
        ({"logging_dir": "logs", "log_with": "wandb"}, {"log_with": "wandb"}),
        ({"lr_warmup_steps": "0.05"}, {"lr_warmup_steps": 0.05}),
        ({"lr_warmup_steps": "5"}, {"lr_warmup_steps": 5}),
        ({"metadata_tags": ["a", "b"]}, {"metadata_tags": "a,b"}),
    ],
)
def test_kohyas_names_are_taken_as_what_they_mean(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    config, problems, warnings = read(**options)
    assert (problems, warnings) == ([], [])
    assert {name: getattr(config, name) for name in expected} == expected


def test_two_values_of_one_thing_are_an_error() -> None:
    assert read(unet_lr=1e-4, learning_rate=2e-4)[1] == [
        "--unet_lr means --learning_rate 0.0001, found --learning_rate 0.0002 too: leave one of "
        "them out."
    ]
    assert "--use_8bit_adam means" in read(use_8bit_adam=True, optimizer_type="Lion")[1][0]
    assert "--v2 means --base sd21" in read(v2=True)[1][0]


def test_the_command_line_beats_the_file_under_any_name(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("learning_rate = 1e-4\noptimizer_type = 'Lion'\n")
    config, problems, _ = read(config_file=str(file), unet_lr="2e-4", use_8bit_adam=True)
    assert (config.learning_rate, config.optimizer_type, problems) == (2e-4, "AdamW8bit", [])


def test_strict_makes_warnings_errors(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--base", "sd15", "--xformers"]
    assert parse_arguments(line).base == "sd15"
    assert capsys.readouterr().err.startswith("warning: taken without effect: --xformers")
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([*line, "--strict"])
    assert capsys.readouterr().err.startswith("error: taken without effect: --xformers")


def test_hints_name_the_same_meaning_or_nothing() -> None:
    known = TrainConfig.model_fields
    for name in ("clip_g", "dim_from_weights", "learning_rate_te3", "quantum", "network_dims"):
        if name not in known:
            assert hint(name, known) is None
    for name, ours in {"learning-rate": "learning_rate", "save_every_n_step": "save_every_n_steps",
                       "Seed": "seed", "lr": "learning_rate"}.items():  # fmt: skip
        assert hint(name, known) == ours
    assert set(SYNONYMS.values()) - {"guidance_scale"} <= set(known)  # of the evaluation
    taken = {*EFFECTLESS, *OF_LORA, *REFUSED, *SAME, *MEANT}
    assert not taken & set(known)  # never both ours and not ours
    assert not taken & set(SYNONYMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**32}, "expected a number of at most 4294967295, found 4294967296"),
        ({"output_name": "a/b"}, "without folders, and --output_dir for the folder, found 'a/b'"),
        ({"output_name": ".."}, "without folders"),
        ({"caption_extension": "a/b"}, "expected an ending such as .txt, found 'a/b'"),
        ({"lr_warmup_steps": 1.5}, "a whole number of steps, or a share of all steps below 1"),
        ({"lr_scheduler_args": ["a=1"]}, "needs --lr_scheduler_type"),
        ({"lr_scheduler": "linear", "lr_scheduler_min_lr_ratio": 0.1}, "needs --lr_scheduler cos"),
    ],
)
def test_values_that_would_fail_later_are_sentences(options: dict[str, Any], message: str) -> None:
    _, problems, _ = read(**options)
    assert len(problems) == 1
    assert message in problems[0]


def test_the_largest_seed_is_taken() -> None:
    assert read(seed=2**32 - 1)[1] == []


def test_no_base_lists_bases_and_shows_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--train_data_dir", "photos"])
    listed = capsys.readouterr().err
    assert "give one of digits, sd15, " in listed
    assert "python" not in listed
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([])
    commands = [line for line in capsys.readouterr().err.splitlines() if "  python" in line]
    assert len(commands) == 3
    for command in commands:
        parse_arguments(command.split()[2:])
    given = ["--pretrained_model_name_or_path", "w.safetensors"]
    assert parse_arguments(given).base == "auto"


# The keys that kohya's user interface writes, most of them off.
GUI_FILE = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_dropout_every_n_epochs = 0
caption_dropout_rate = 0
caption_extension = ".txt"
clip_skip = 1
color_aug = false
dynamo_backend = "no"
enable_bucket = true
face_crop_aug_range = ""
full_bf16 = false
gradient_accumulation_steps = 2
huber_c = 0.1
huber_schedule = "snr"
ip_noise_gamma = 0
keep_tokens = 0
learning_rate = 0
logging_dir = ""
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_scheduler_type = ""
lr_warmup_steps = 0.1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_epochs = 0
max_train_steps = 800
mem_eff_attn = false
metadata_author = ""
min_bucket_reso = 256
min_snr_gamma = 0
mixed_precision = "fp16"
multires_noise_discount = 0.3
multires_noise_iterations = 0
network_alpha = 4
network_args = []
network_dim = 8
network_dropout = 0
network_module = "networks.lora"
noise_offset = 0
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "out"
output_name = "name"
persistent_data_loader_workers = 0
pretrained_model_name_or_path = "model.safetensors"
prior_loss_weight = 1
reg_data_dir = ""
resolution = "512,512"
resume = ""
sample_every_n_epochs = 0
sample_prompts = ""
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_every_n_steps = 0
save_last_n_steps = 0
save_last_n_steps_state = 0
save_model_as = "safetensors"
save_precision = "fp16"
scale_v_pred_loss_like_noise_pred = false
scale_weight_norms = 0
seed = 1
stop_text_encoder_training = 0
text_encoder_lr = [1e-4, 1e-4]
train_batch_size = 3
train_data_dir = "images"
unet_lr = 2e-4
v2 = false
v_parameterization = false
v_pred_like_loss = 0
vae = ""
vae_batch_size = 0
wandb_api_key = ""
wandb_run_name = "name"
weighted_captions = false
xformers = true
"""


def test_a_file_of_kohyas_user_interface_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "gui.toml"
    file.write_text(GUI_FILE)
    found = read_options({"config_file": str(file)}).config
    assert read_options({"config_file": str(file)}).problems == []
    assert (found.base, found.learning_rate, found.vae, found.max_train_steps) == (
        "auto", 2e-4, None, 800,
    )  # fmt: skip
    # The batch that was asked for, not the recipe's.
    assert (found.train_batch_size, found.gradient_accumulation_steps) == (3, 2)
    assert found.global_batch_size is None
