"""Command lines of the kind that people publish for kohya's scripts start training as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmp_common import Patch
from tests.training.conftest import Folders
from tests.training.tinybases import make_vae
from training.train_dmp import main

# Capitals stand for files. Only sizes and numbers of steps are those of a tiny base.
LINES: dict[str, tuple[str, str]] = {
    "lora, sd15, dataset file": (
        "sd15",
        "--pretrained_model_name_or_path=CKPT --vae=VAE --dataset_config=DATASET --output_dir=OUT "
        "--output_name=one --save_model_as=safetensors --network_module=networks.lora "
        "--network_dim=16 --network_alpha=8 --network_train_unet_only --learning_rate=1e-4 "
        "--optimizer_type=AdamW8bit --lr_scheduler=cosine --lr_warmup_steps=1 "
        "--max_train_epochs=1 --mixed_precision=fp16 --save_precision=fp16 --cache_latents "
        "--gradient_checkpointing --sdpa --max_data_loader_n_workers=0 --seed=42",
    ),
    "dreambooth switches": (
        "sd15",
        "--pretrained_model_name_or_path CKPT --train_data_dir IMAGES --output_dir OUT "
        "--output_name=one --prior_loss_weight=1.0 --resolution=16 --train_batch_size=1 "
        "--learning_rate=1e-5 --max_train_steps=2 --xformers --mixed_precision=fp16 "
        "--save_every_n_epochs=1 --save_model_as=safetensors --clip_skip=2 --seed=1 --color_aug "
        "--network_module=networks.lora --enable_bucket --use_8bit_adam",
    ),
    "two learning rates": (
        "sd15",
        "--pretrained_model_name_or_path=CKPT --train_data_dir=IMAGES --resolution=16,16 "
        "--output_dir=OUT --output_name=one --max_train_epochs=1 --learning_rate=0.0001 "
        "--unet_lr=1e-4 --text_encoder_lr=0.00005 --lr_scheduler=cosine_with_restarts "
        "--lr_scheduler_num_cycles=3 --network_module=networks.lora --network_dim=32 "
        "--network_alpha=16 --save_every_n_epochs=1 --mixed_precision=bf16 --cache_latents "
        "--cache_latents_to_disk --train_batch_size=3 --caption_extension=.txt --shuffle_caption "
        "--keep_tokens=1 --max_token_length=225 --noise_offset=0.0 --sample_sampler=euler_a "
        "--sample_prompts=PROMPTS --bucket_no_upscale --bucket_reso_steps=16",
    ),
    "flux": (
        "flux",
        "--pretrained_model_name_or_path CKPT --clip_l CLIPL --t5xxl T5 --ae AE "
        "--cache_latents_to_disk --save_model_as safetensors --sdpa "
        "--persistent_data_loader_workers --max_data_loader_n_workers 0 --seed 42 "
        "--gradient_checkpointing --mixed_precision bf16 --save_precision bf16 "
        "--network_module networks.lora_flux --network_dim 4 --network_alpha 4 "
        "--optimizer_type adafactor --learning_rate 1e-3 --network_train_unet_only "
        "--cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --fp8_base --highvram "
        "--max_train_epochs 1 --dataset_config DATASET --timestep_sampling shift "
        "--discrete_flow_shift 3.0 --model_prediction_type raw --guidance_scale 1.0 "
        "--output_dir OUT --output_name one",
    ),
    "fine-tuning sdxl": (
        "sdxl",
        "--pretrained_model_name_or_path=CKPT --dataset_config=DATASET --output_dir=OUT "
        "--output_name=one --logging_dir=LOGS --learning_rate=1e-5 --min_bucket_reso=8 "
        "--max_bucket_reso=64 --lr_scheduler=constant_with_warmup --lr_warmup_steps=0.5 "
        "--train_batch_size=2 --max_train_steps=2 --save_state --no_half_vae "
        "--cache_text_encoder_outputs_to_disk --cache_latents_to_disk --optimizer_type=Adafactor "
        "--optimizer_args scale_parameter=False relative_step=False warmup_init=False --xformers "
        "--min_snr_gamma=0 --full_bf16 --mixed_precision=bf16 --loss_type=huber "
        "--huber_schedule=snr --huber_c=0.1",
    ),
    "sd3": (
        "sd3",
        "--pretrained_model_name_or_path=CKPT --clip_l=CLIPL --clip_g=CLIPG --t5xxl=T5 "
        "--dataset_config=DATASET --output_dir=OUT --output_name=one "
        "--network_module=networks.lora_sd3 --network_dim=4 --network_alpha=1 "
        "--learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa "
        "--max_train_epochs=1 --mixed_precision=fp16 --weighting_scheme=logit_normal "
        "--blocks_to_swap=1 --metadata_title=title --metadata_author=author "
        "--training_comment=comment",
    ),
}


@pytest.fixture
def words(folders: Folders, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """A command line as words, with files in the places of its capitals."""

    def words(base: str, line: str) -> list[str]:
        images = tmp_path / "images" / "2_cat"
        shutil.copytree(folders("pictures"), images)
        dataset = (
            f"[general]\nresolution = 16\ncaption_extension = '.txt'\n[[datasets]]\n"
            f"batch_size = 1\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
            "num_repeats = 2\n"
        )
        (tmp_path / "dataset.toml").write_text(dataset, encoding="utf-8")
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red cat --n blue --w 16 --h 16 --d 1 --s 2 --l 2\n", encoding="utf-8")
        make_vae().save_pretrained(tmp_path / "vae")
        encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
        clip, other, third = (folders(base) / name / "model.safetensors" for name in encoders)
        places = {
            "CLIPL": clip, "CLIPG": other, "T5": other if base == "flux" else third,
            "AE": folders(base) / "vae" / "diffusion_pytorch_model.safetensors",
            "CKPT": folders(base), "VAE": tmp_path / "vae", "IMAGES": images.parent,
            "DATASET": tmp_path / "dataset.toml", "OUT": tmp_path / "out",
            "LOGS": tmp_path / "logs", "PROMPTS": prompts,
        }  # fmt: skip
        found = []
        for word in line.split():
            name, sign, value = word.rpartition("=")
            found.append(f"{name}{sign}{places.get(value, value)}")
        return found

    return words


@pytest.mark.parametrize("name", list(LINES))
def test_a_published_command_line_trains(
    name: str,
    words: Callable[[str, str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, line = LINES[name]
    short = ["--t5_max_token_length", "6"] if base in ("flux", "sd3") else []
    assert main([*words(base, line), "--global_batch_size", "6", *short]) == 0
    patch = Patch.load(tmp_path / "out" / "one.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())
    warned = capsys.readouterr().err
    for option in ("network_module", "sdpa", "xformers", "text_encoder_lr", "save_model_as"):
        assert (f"--{option}" in warned) == (f"--{option}" in line)
