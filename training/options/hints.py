"""What to say of an option that does not exist: the one with the same meaning, or nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from training.options.kohya import OURS_OF_LORA

# Names of other trainers, and words that people try first: ours for the same thing.
SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("lr", "rate", "prompt_lr"), "learning_rate"),
    **dict.fromkeys(("batch_size", "batch", "per_device_train_batch_size"), "train_batch_size"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "num_train_epochs"), "max_train_epochs"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "train_steps"), "max_train_steps"),
    **dict.fromkeys(("num_train_steps", "iterations", "max_iterations"), "max_train_steps"),
    **dict.fromkeys(("model", "checkpoint", "ckpt", "weights"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("model_path", "pretrained_model", "dit"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("data", "data_dir", "images", "image_dir"), "train_data_dir"),
    **dict.fromkeys(("instance_data_dir", "dataset_dir", "train_dir"), "train_data_dir"),
    **dict.fromkeys(("dataset", "train_dataset"), "dataset_name"),
    "split": "dataset_split",
    **dict.fromkeys(("size", "image_size", "img_size"), "resolution"),
    "random_flip": "flip_aug",
    **dict.fromkeys(("optimizer", "optimiser", "optim"), "optimizer_type"),
    **dict.fromkeys(("scheduler", "lr_schedule"), "lr_scheduler"),
    **dict.fromkeys(("warmup", "warmup_steps", "lr_warmup"), "lr_warmup_steps"),
    **dict.fromkeys(("precision", "dtype", "fp16", "bf16"), "mixed_precision"),
    **dict.fromkeys(("out", "output", "out_dir", "outdir", "save_dir"), "output_dir"),
    **dict.fromkeys(("name", "run_name"), "output_name"),
    **dict.fromkeys(("prompts", "prompt_file", "validation_prompt"), "sample_prompts"),
    **dict.fromkeys(("checkpointing_steps", "save_steps", "save_every"), "save_every_n_steps"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from"), "resume"),
    **dict.fromkeys(("ema", "use_ema", "ema_rate"), "ema_decay"),
    **dict.fromkeys(("snr_gamma", "min_snr"), "min_snr_gamma"),
    "instance_prompt": "class_tokens",
    **dict.fromkeys(("dataloader_num_workers", "num_workers"), "max_data_loader_n_workers"),
    **dict.fromkeys(("report_to", "tracker"), "log_with"),
    **dict.fromkeys(("hub_model_id", "push_to_hub", "repo_id"), "huggingface_repo_id"),
    "hub_token": "huggingface_token",
    "flow_shift": "discrete_flow_shift",
    "grad_clip": "max_grad_norm",
    "accumulation_steps": "gradient_accumulation_steps",
    "config": "config_file",
    "validation_steps": "validate_every_n_steps",
    "gradient_clipping": "max_grad_norm",
    "sites": "dmp_sites",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "caption_dropout": "caption_dropout_rate",
}
_CLOSE = 0.88  # of difflib's ratio: one letter in eight or so
_LONGER = 2  # letters


def hint(name: str, known: Collection[str]) -> str | None:
    """The known option that somebody who wrote `name` most probably means.

    Args:
        name: without dashes in front.
        known: names to choose from; never one that would be refused or has no effect.

    >>> hint("learnin_rate", ["learning_rate"]), hint("clip_g", ["flip_aug"])
    ('learning_rate', None)
    """
    wanted = name.replace("-", "_").lower()
    offered = [entry for entry in known if entry not in OURS_OF_LORA]
    for candidate in (wanted, SYNONYMS.get(wanted)):
        if candidate in offered:
            return candidate
    near = difflib.get_close_matches(wanted, offered, n=1, cutoff=_CLOSE)
    return near[0] if near and abs(len(near[0]) - len(wanted)) <= _LONGER else None
