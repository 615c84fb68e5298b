"""What suits a base or recipe better than the general defaults; kohya's flags without use."""

from __future__ import annotations

from typing import Any

# Options that name data; one of them is needed.
SOURCES = ("train_data_dir", "dataset_config", "webdataset", "dataset_name")

# Ours, see docs/RESULTS.md: the patch, and how it is trained.
STAGES: dict[str, Any] = {"grids": 4, "gate_unit": "grid", "gate_form": "residual"}
_STAGES = {**STAGES, "gate_lr_factor": 1.0, "max_timestep": 1000, "relative_loss": True}
# The same with an off switch for the noisy half, and a gate that hardly leaves its beginning.
CLEAN: dict[str, Any] = {**STAGES, "gate_lr_factor": 0.01, "max_timestep": 500}
_CLEAN = {**CLEAN, "relative_loss": False}
# Measured for digits and cifar10-s, see docs/RESULTS.md; the others are sizes that fit, not tuned.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "dataset_name": "digits",
        "learning_rate": 3e-4,
        "max_train_steps": 1000,
        "train_batch_size": 128,
        "lr_warmup_steps": 50,
        "validate_every_n_steps": 200,
        "validation_draws": 4,
        "max_validation_images": None,
        "keep_best": True,
        "report_samples": 2000,
    },
    "cifar10-s": {
        "learning_rate": 3e-4,
        "max_train_steps": 600,
        "train_batch_size": 128,
        "lr_warmup_steps": 50,
    },
    **{name: {"train_batch_size": 4} for name in ("sd15", "sd21", "pixart")},
    **{name: {"train_batch_size": 1} for name in ("sdxl", "sd3", "sd35-medium", "sd35-large")},
    "flux": {"train_batch_size": 1},
    **{
        f"dit-{size}/{tokens}": {"train_batch_size": 16}
        for size in ("s", "b", "l", "xl")
        for tokens in (2, 4, 8)
    },
}
# What --method dmp is on a base where another variant than the paper's was shown to be better.
VARIANTS: dict[str, dict[str, Any]] = {"digits": _STAGES, "cifar10-s": _CLEAN}

# Ham et al. 2025, section 5 and the official code: AdamW with a constant rate on the prompts
# themselves, ten times it on gate and noise.
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "paper": {
        "optimizer_type": "AdamW",
        "prompt_scale": "literal",
        "learning_rate": 1e-4,
        "gate_lr_factor": 10.0,
        "weight_decay": 0.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": 0.0,
        "global_batch_size": 128,
        "importance_weight": 1.0,
        "load_weight": 1.0,
        "ema_decay": 0.0,
        "grids": 1,
        "gate_unit": "prompt",
        "gate_form": "softmax",
        "max_timestep": 1000,
        "relative_loss": False,
    },
    "stages": _STAGES,
    "clean": _CLEAN,
}

_NO_UNET_LR = "a patch has one rate, --learning_rate, and --gate_lr_factor for its gate"
_NO_TEXT = "text encoders stay frozen, only the denoiser is patched"
_NO_LORA = "a patch is no network of modules; use --dmp_sites, --dmp_depth and --gate"
_ATTENTION = "PyTorch's own attention (sdpa) is used always"
_MEMORY = "use --gradient_checkpointing, --mixed_precision or --fsdp"

# kohya's options that mean nothing here, and what to use instead.
ELSEWHERE: dict[str, str] = {
    "unet_lr": _NO_UNET_LR,
    "text_encoder_lr": _NO_TEXT,
    "network_train_unet_only": _NO_TEXT,
    "network_train_text_encoder_only": _NO_TEXT,
    "train_text_encoder": _NO_TEXT,
    "stop_text_encoder_training": _NO_TEXT,
    "learning_rate_te": _NO_TEXT,
    "learning_rate_te1": _NO_TEXT,
    "learning_rate_te2": _NO_TEXT,
    "network_module": "choose with --method dmp, prompt, lora or full",
    "network_args": _NO_LORA,
    "network_dropout": _NO_LORA,
    "scale_weight_norms": _NO_LORA,
    "base_weights": "use --network_weights to go on from a patch",
    "xformers": _ATTENTION,
    "mem_eff_attn": _ATTENTION,
    "flash_attn": _ATTENTION,
    "lowram": _MEMORY,
    "highvram": _MEMORY,
    "full_fp16": "--mixed_precision fp16 already keeps the frozen base in half precision",
    "full_bf16": "--mixed_precision bf16 already keeps the frozen base in half precision",
    "fp8_base": "--mixed_precision bf16 keeps the frozen base in half precision",
    "blocks_to_swap": _MEMORY,
    "use_8bit_adam": "use --optimizer_type AdamW8bit",
    "use_lion_optimizer": "use --optimizer_type Lion",
    "v2": "use --base sd21",
    "sdxl": "use --base sdxl",
    "save_model_as": "a patch is always a .safetensors file",
    "prior_loss_weight": "a patch learns the base's own data, without regularisation images",
    "reg_data_dir": "a patch learns the base's own data, without regularisation images",
    "multires_noise_iterations": "use --noise_offset",
    "adaptive_noise_scale": "use --noise_offset",
    "ip_noise_gamma": "use --noise_offset",
    "weighted_captions": "captions are encoded as they are; take the weights out",
    "token_warmup_step": "use --caption_dropout_rate",
    "save_n_epoch_ratio": "use --save_every_n_epochs",
    "save_last_n_epochs": "use --save_last_n_steps",
    "training_comment": "use --output_name",
    "wandb_api_key": "log in with `wandb login`",
    "in_memory_cache": "use --cache_latents",
    "num_cpu_threads_per_process": "give it to accelerate launch, before the script",
    "guidance_scale": "use --flux_guidance_scale",
    "sample_sampler": "previews use deterministic DDIM, or Euler for flow models",
    "deepspeed": "launch with training/accelerate/deepspeed.yaml",
    "ddp_timeout": "set it in the accelerate configuration",
}
