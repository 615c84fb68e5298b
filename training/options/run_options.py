"""Options about optimisation, precision, scale, and what a run leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from training.options.declaring import option

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class OptimisationOptions(BaseModel):
    """How the trained values move."""

    recipe: Literal["none", "paper", "stages", "clean"] = option(
        "optimisation",
        "none",
        "paper: AdamW, learning rate 1e-4 on the prompts themselves, gate and noise x10, weight "
        "decay 0, global batch 128, both balancing losses at 1, no EMA; stages: four coarser "
        "grids, each for a part of the noise levels, trained with --relative_loss; clean: such "
        "grids for timesteps below 500 alone, off above, plain loss, gate x0.01",
    )
    optimizer_type: str = option(
        "optimisation",
        "AdamW",
        "AdamW, AdamW8bit, PagedAdamW8bit, Lion, Lion8bit, Adafactor, Prodigy, DAdaptAdam, "
        "SGDNesterov, AdamWScheduleFree, SGDScheduleFree, or module.Class",
    )
    optimizer_args: list[str] = option("optimisation", [], 'of the optimiser, as "name=value" each')
    learning_rate: float = option(
        "optimisation", 1e-3, "of the prompts (see --prompt_scale), or of lora and full", gt=0
    )
    gate_lr_factor: float = option(
        "optimisation", 1.0, "learning rate of the gate over that of the prompts", gt=0
    )
    weight_decay: float = option("optimisation", 0.0, "of the optimiser", ge=0)
    lr_scheduler: Scheduler = option("optimisation", "cosine", "how the learning rate changes")
    lr_warmup_steps: int = option("optimisation", 0, "steps of rising learning rate", ge=0)
    lr_scheduler_num_cycles: int = option("optimisation", 1, "of cosine_with_restarts", ge=1)
    lr_scheduler_power: float = option("optimisation", 1.0, "of polynomial", gt=0)
    max_train_steps: int = option("optimisation", 1600, "optimiser steps", ge=1)
    max_train_epochs: int | None = option(
        "optimisation", None, "passes over the data, instead of max_train_steps", ge=1
    )
    gradient_accumulation_steps: int = option("optimisation", 1, "batches of a step", ge=1)
    global_batch_size: int | None = option(
        "optimisation",
        None,
        "images of an optimiser step over all processes; chooses gradient_accumulation_steps",
        ge=1,
    )
    max_grad_norm: float = option("optimisation", 1.0, "longest gradient, 0 for any", ge=0)
    ema_decay: float = option(
        "optimisation", 0.99, "of the averaged patch that is saved, 0 for none", ge=0, lt=1
    )
    seed: int = option("optimisation", 0, "of data order, noise and initial values", ge=0)


class ScaleOptions(BaseModel):
    """Precision, memory, many devices."""

    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "precision and scale", "no", "arithmetic of the frozen base; the patch stays float32"
    )
    gradient_checkpointing: bool = option("precision and scale", False, "less memory, more time")
    fp8_base: bool = option(
        "precision and scale",
        False,
        "Keep the weights of the frozen base in 8-bit floating point (float8_e4m3fn) and convert "
        "each layer to the precision of --mixed_precision while it computes. Use it together with "
        "--gradient_checkpointing: without it the converted weights are kept until the backward "
        "pass.",
    )
    int8_base: bool = option(
        "precision and scale",
        False,
        "Keep the linear layers of the frozen base as 8-bit integers with a scale for each row. "
        "This needs the package torchao.",
    )
    blocks_to_swap: int | None = option(
        "precision and scale",
        None,
        "Keep this many transformer blocks of the frozen base in the memory of the CPU and copy "
        "each to the GPU while it computes; 0 disables it. It needs --gradient_checkpointing and "
        "has no effect on a CPU.",
        ge=0,
    )
    torch_compile: bool = option("precision and scale", False, "compile the base")
    dynamo_backend: str = option("precision and scale", "inductor", "of --torch_compile")
    fsdp: bool = option(
        "precision and scale",
        False,
        "shard the frozen base over the processes (FSDP2); the patch is small and stays whole",
    )
    cpu: bool = option("precision and scale", False, "train on the CPU even where a GPU is")
    deterministic: bool = option(
        "precision and scale", False, "only deterministic GPU operations: runs repeat bit for bit"
    )


class OutputOptions(BaseModel):
    """Files, previews, validation, logs."""

    output_dir: str = option("output", "output/{base}", "folder of everything a run leaves")
    output_name: str = option("output", "{base}-{method}", "name of the patch, without ending")
    save_precision: Literal["float", "fp16", "bf16"] = option("output", "float", "of the file")
    save_every_n_steps: int | None = option("output", None, "also save along the way", ge=1)
    save_every_n_epochs: int | None = option("output", None, "also save along the way", ge=1)
    save_last_n_steps: int | None = option(
        "output", None, "keep those of the last n steps only, files and states", ge=1
    )
    save_last_n_epochs: int | None = option("output", None, "see --save_last_n_steps", ge=1)
    save_last_n_steps_state: int | None = option("output", None, "of states alone", ge=1)
    save_last_n_epochs_state: int | None = option("output", None, "of states alone", ge=1)
    validate_every_n_epochs: int | None = option("validation", None, "epochs", ge=1)
    sample_sampler: str | None = option("previews", None, "sampler of the previews")
    overwrite: bool = option(
        "output", False, "Write over the files of an earlier run with this name."
    )
    save_state: bool = option(
        "output", False, "with every save also the state to --resume from (kohya's name)"
    )
    save_state_on_train_end: bool = option("output", False, "a state at the end")
    resume: str | None = option("output", None, "folder of a state to go on from, or latest")
    sample_prompts: str | None = option(
        "previews",
        None,
        "file of prompts, one a line, with kohya's --w --h --d --s --l --n (a DiT: class ids)",
    )
    sample_every_n_steps: int | None = option("previews", None, "steps between previews", ge=1)
    sample_every_n_epochs: int | None = option("previews", None, "epochs between previews", ge=1)
    sample_at_first: bool = option("previews", False, "a preview before the first step")
    sample_steps: int = option("previews", 20, "denoising steps of a preview", ge=1)
    validate_every_n_steps: int | None = option(
        "validation", None, "steps between validations", ge=1
    )
    validation_bins: int = option("validation", 10, "equal ranges of timesteps", ge=1, le=100)
    validation_draws: int = option("validation", 1, "noises for each image and range", ge=1)
    max_validation_images: int | None = option(
        "validation", 64, "images that are enough for a validation", ge=1
    )
    keep_best: bool = option(
        "validation", False, "the final file is the one that validated best, not the last"
    )
    report_samples: int = option(
        "validation",
        0,
        "digits only: generated images to judge by (rounded up), 0 for no report",
        ge=0,
    )
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        "logging", None, "where to log besides the terminal"
    )
    logging_dir: str | None = option(
        "logging", None, "folder of TensorBoard's logs (default: logs in output_dir)"
    )
    log_prefix: str | None = option("logging", None, "of the name of the run in the logs")
    log_every_n_steps: int = option("logging", 1, "steps between values in the logs", ge=1)
    huggingface_repo_id: str | None = option(
        "hub", None, "push the final patch there, with a model card and previews"
    )
    huggingface_private: bool = option("hub", False, "make a private repository")
    huggingface_token: str | None = option("hub", None, "token (default: that of `hf auth login`)")
    dry_run: bool = option(
        "run",
        False,
        "print the configuration, data, memory and parameter counts, do one step, save nothing",
    )
    config_file: str | None = option("run", None, "TOML file of options; the command line wins")
    output_config: str | None = option(
        "run", None, "write the resolved options as TOML to this file (- for the screen), and stop"
    )
