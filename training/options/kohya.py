"""kohya's options that the trainer takes under another name, without effect, or not at all.

The names and their meanings are those of kohya's sd-scripts for SD 1.x, SD 2.x, SDXL, SD3, Flux and
Lumina.
"""

from __future__ import annotations

from typing import Any

# kohya's name: our name for the same thing.
SAME: dict[str, str] = {
    "unet_lr": "learning_rate",
    "guidance_scale": "flux_guidance_scale",
    "training_shift": "discrete_flow_shift",
    "t5xxl_max_token_length": "t5_max_token_length",
    **dict.fromkeys(("gemma2", "qwen3"), "text_encoder"),
    "byt5": "t5xxl",
    **dict.fromkeys(("gemma2_max_token_length", "qwen3_max_token_length"), "llm_max_token_length"),
    "wandb_name": "wandb_run_name",
    "caption_extention": "caption_extension",  # their old spelling
}
# kohya's switches, and the options that they stand for.
MEANT: dict[str, dict[str, Any]] = {
    "use_8bit_adam": {"optimizer_type": "AdamW8bit"},
    "use_lion_optimizer": {"optimizer_type": "Lion"},
    "v2": {"base": "sd21"},
    "sdxl": {"base": "sdxl"},
}
# kohya's values of options that we have, and ours for the same thing.
VALUES: dict[str, dict[str, str]] = {
    "weighting_scheme": {"uniform": "none"},
    "timestep_sampling": {"flux2_shift": "flux_shift"},  # which counts the base's own tokens
    "loss_type": {"L2": "l2"},
}

_TEXT = "text encoders stay frozen"
_NETWORK = "the size of a patch is set by --dmp_sites, --dmp_depth and --grid"
_ATTENTION = "PyTorch's scaled dot product attention is always used"
_MEMORY = "use --gradient_checkpointing and --mixed_precision to save memory"
_HALF = "--mixed_precision already keeps the frozen base in half precision"
_LOADING = "files are read without it"
_LOGS = "the trainer's own output replaces it"
_LAUNCH = "give it to accelerate launch, before the script"
_METADATA = "use --metadata_description"
_HUB = "a patch is uploaded to its repository as a whole, at the end"

# Options that change nothing about a patch, and why: they are taken with a warning.
EFFECTLESS: dict[str, str] = {
    **dict.fromkeys(("save_model_as", "use_safetensors"), "a patch is always a .safetensors file"),
    **dict.fromkeys(("metadata_thumbnail", "metadata_merged_from"), _METADATA),
    **dict.fromkeys(("metadata_preprocessor", "metadata_is_negative_embedding"), _METADATA),
    **dict.fromkeys(("metadata_usage_hint", "metadata_trigger_phrase"), _METADATA),
    "network_module": "--method says what is trained",
    **dict.fromkeys(("text_encoder_lr", "network_train_unet_only"), _TEXT),
    **dict.fromkeys(("learning_rate_te", "learning_rate_te1", "learning_rate_te2"), _TEXT),
    **dict.fromkeys(("learning_rate_te3", "stop_text_encoder_training"), _TEXT),
    **dict.fromkeys(("save_clip", "save_t5xxl"), _TEXT),
    **dict.fromkeys(("xformers", "mem_eff_attn", "sdpa", "flash_attn", "sage_attn"), _ATTENTION),
    **dict.fromkeys(("split_attn", "diffusers_xformers", "attn_mode"), _ATTENTION),
    **dict.fromkeys(("full_fp16", "full_bf16", "save_weights_dtype"), _HALF),
    **dict.fromkeys(("lowram", "highvram", "mem_eff_save", "cpu_offload_checkpointing"), _MEMORY),
    **dict.fromkeys(("fused_backward_pass", "fused_optimizer_groups"), _MEMORY),
    **dict.fromkeys(("blockwise_fused_optimizers", "split_mode"), _MEMORY),
    **dict.fromkeys(("single_blocks_to_swap", "double_blocks_to_swap"), _MEMORY),
    **dict.fromkeys(("t5xxl_dtype", "t5xxl_device", "text_encoder_batch_size"), _MEMORY),
    **dict.fromkeys(("pin_memory", "prefetch_factor", "tokenizer_cache_dir"), _LOADING),
    **dict.fromkeys(("cache_info", "skip_cache_check", "use_t5xxl_cache_only"), _LOADING),
    "in_memory_cache": "use --cache_latents",
    **dict.fromkeys(("skip_latents_validity_check", "skip_image_resolution"), _LOADING),
    **dict.fromkeys(("disable_mmap_load_safetensors", "loader_num_workers"), _LOADING),
    "vae_batch": "the cache is filled --vae_batch_size images at a time",
    "resize_interpolation": "images are resized by one method, which suits photographs",
    "prior_loss_weight": "there are no regularisation images",
    "token_warmup_min": "captions are whole from the first step on",
    "no_metadata": "a patch file describes itself, and nothing can be left out of it",
    "model_prediction_type": "flow models are trained on their raw output",
    "noise_offset_type": "--noise_offset and --multires_noise_iterations say it themselves",
    "max_validation_steps": "use --max_validation_images",
    "save_n_epoch_ratio": "use --save_every_n_epochs",
    "wandb_api_key": "log in with `wandb login`",
    **dict.fromkeys(("console_log_level", "console_log_file", "console_log_simple"), _LOGS),
    **dict.fromkeys(("log_tracker_name", "log_tracker_config", "log_config"), _LOGS),
    **dict.fromkeys(("num_cpu_threads_per_process", "ddp_timeout"), _LAUNCH),
    **dict.fromkeys(("ddp_gradient_as_bucket_view", "ddp_static_graph"), _LAUNCH),
    **dict.fromkeys(("huggingface_repo_type", "huggingface_path_in_repo", "async_upload"), _HUB),
    "save_state_to_huggingface": _HUB,
}
# Options about the networks of a LoRA. They change nothing about a patch, but something about
# --method lora; network_dim and network_alpha are options of ours there.
OF_LORA: dict[str, str] = {
    **dict.fromkeys(("network_args", "network_dropout", "scale_weight_norms"), _NETWORK),
    **dict.fromkeys(("dim_from_weights", "conv_dim", "conv_alpha", "block_dims"), _NETWORK),
    **dict.fromkeys(("block_alphas", "conv_block_dims", "conv_block_alphas"), _NETWORK),
}
OURS_OF_LORA = ("network_dim", "network_alpha")

_NO_TEXT = "text encoders stay frozen, only the denoiser is patched; leave it out"
_REGULARISED = "a patch learns the base's own data, without regularisation images; leave it out"
_CONTROL = "ControlNets are not trained; leave it out"
_INVERSION = "textual inversion is not trained; leave it out"
_RESUMED = "use --resume to go on from a saved state"
_DEEPSPEED = "launch with training/accelerate/deepspeed.yaml"
_SITES = "use --dmp_sites"
_MASKED = "the masks of text encoders are those of the base's own pipeline; leave it out"
_DROPOUT = "use --caption_dropout_rate, which drops whole captions"

# Options that would change the result and that we do not have, and what to do.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("train_text_encoder", "network_train_text_encoder_only"), _NO_TEXT),
    "train_t5xxl": _NO_TEXT,
    "no_token_padding": "captions are padded as the base was trained; leave it out",
    "base_weights": "use --network_weights to initialise from a patch",
    "base_weights_multiplier": "use --network_weights to initialise from a patch",
    "reg_data_dir": _REGULARISED,
    "weighted_captions": "captions are encoded as they are written; take the weights out of them",
    "token_warmup_step": "captions are whole from the first step on; use --caption_dropout_rate",
    "face_crop_aug_range": "faces are not looked for; use --random_crop",
    "scale_v_pred_loss_like_noise_pred": "use --min_snr_gamma or --debiased_estimation_loss",
    "v_pred_like_loss": "use --min_snr_gamma or --debiased_estimation_loss",
    "block_lr": "a patch has one rate, --learning_rate, and --gate_lr_factor for its gate",
    "optimizer_schedulefree_wrapper": "use --optimizer_type AdamWScheduleFree",
    "schedulefree_wrapper_args": "use --optimizer_type AdamWScheduleFree with --optimizer_args",
    "dataset_repeats": "use num_repeats in the file of --dataset_config",
    "dataset_class": "use --train_data_dir, --dataset_config, --webdataset or --dataset_name",
    "debug_dataset": "use --dry_run",
    **dict.fromkeys(("controlnet_model_name_or_path", "controlnet", "cond_emb_dim"), _CONTROL),
    **dict.fromkeys(("token_string", "init_word", "num_vectors_per_token"), _INVERSION),
    **dict.fromkeys(("use_object_template", "use_style_template"), _INVERSION),
    **dict.fromkeys(("initial_epoch", "initial_step", "skip_until_initial_step"), _RESUMED),
    "resume_from_huggingface": "download the state and name its folder with --resume",
    **dict.fromkeys(("deepspeed", "zero_stage", "offload_optimizer_device"), _DEEPSPEED),
    **dict.fromkeys(
        ("offload_param_device", "zero3_init_flag", "zero3_save_16bit_model"), _DEEPSPEED
    ),
    **dict.fromkeys(("offload_optimizer_nvme_path", "offload_param_nvme_path"), _DEEPSPEED),
    "fp16_master_weights_and_gradients": _DEEPSPEED,
    **dict.fromkeys(("apply_t5_attn_mask", "apply_lg_attn_mask"), _MASKED),
    **dict.fromkeys(("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"), _DROPOUT),
    "pos_emb_random_crop_rate": "SD3 is trained with its own position embedding; leave it out",
    "enable_scaled_pos_embed": "SD3 is trained with its own position embedding; leave it out",
    "train_inpainting": "inpainting models are not trained; leave it out",
    **dict.fromkeys(("fp8_base_unet", "fp8_scaled"), "use --fp8_base"),
    **dict.fromkeys(("train_double_block_indices", "train_single_block_indices"), _SITES),
    "num_last_block_to_freeze": _SITES,
    "perlin_noise": "use --noise_offset or --multires_noise_iterations",
    "model_type": "choose the model with --base",
}
# Values with which such an option changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dataset_repeats": (1,),
    "model_type": ("flux",),
}
# Values that are not taken of options without effect, because they would have one.
DIFFERENT: dict[str, dict[str, str]] = {
    "model_prediction_type": dict.fromkeys(
        ("additive", "sigma_scaled"), "expected raw, which flow models are trained on"
    ),
}


def is_off(value: Any) -> bool:
    """Whether a value switches an option off: false, empty, 0, and their texts.

    >>> [is_off(value) for value in (False, "", 0, "0.0", "false", None, [], 1, "x")]
    [True, True, True, True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return value.strip().lower() in ("", "0", "0.0", "false", "none", "null")
    return not value
