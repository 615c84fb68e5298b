"""Options about optimisation: recipe, optimiser, learning rate, number of steps, seed."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import field_validator

from training.options.declaring import Options, option

Recipe = Literal["none", "paper", "stages", "clean", "repair", "guidance"]
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt",
]  # fmt: skip
_LARGEST_SEED = 2**32 - 1  # numpy's limit


class OptimisationOptions(Options):
    """How the trained values move."""

    recipe: Recipe | None = option(
        "optimisation",
        None,
        "Choose a set of options; options that you give yourself win. paper: the recipe of the "
        "paper, with 50,000 steps of 128 images. stages: four coarser grids, each for a part of "
        "the noise levels, trained with --relative_loss. clean: such grids for timesteps below "
        "500 alone. repair: --objective distill for a model with rounded weights, by scaling and "
        "shifting channels. guidance: --objective distill for the second call of guidance. none: "
        "the defaults listed here. By default it is repair or guidance with --objective distill; "
        "none for digits and cifar10-s, which have measured settings of their own; else paper.",
        common=True,
    )
    optimizer_type: str = option(
        "optimisation",
        "AdamW",
        "Use this optimiser: AdamW, Adam, SGDNesterov, Adafactor, and with their packages "
        "AdamW8bit, PagedAdamW8bit, Lion, Lion8bit, Prodigy, DAdaptAdam, AdamWScheduleFree, "
        "SGDScheduleFree and their relatives, or any class as module.Class.",
        common=True,
        min_length=1,
    )
    optimizer_args: list[str] = option(
        "optimisation", [], "Pass these arguments to the optimiser, each as name=value."
    )
    learning_rate: float = option(
        "optimisation",
        1e-3,
        "Train the prompts, or the values of --method lora, full and joint, with this learning "
        "rate. kohya's --unet_lr is the same.",
        gt=0,
        common=True,
    )
    gate_lr_factor: float = option(
        "optimisation",
        1.0,
        "Train the gate with this multiple of the learning rate.",
        gt=0,
    )
    weight_decay: float = option("optimisation", 0.0, "Use this weight decay; 0 disables it.", ge=0)
    lr_scheduler: Scheduler = option(
        "optimisation",
        "cosine",
        "Change the learning rate in this way during the run.",
        common=True,
    )
    lr_warmup_steps: int | float = option(
        "optimisation",
        0,
        "Let the learning rate rise from 0 in this many steps; a number below 1 is a share of "
        "all steps.",
        ge=0,
    )
    lr_decay_steps: int | float = option(
        "optimisation",
        0,
        "Let the learning rate fall in this many last steps of --lr_scheduler "
        "warmup_stable_decay; a number below 1 is a share of all steps.",
        ge=0,
    )
    lr_scheduler_num_cycles: int = option(
        "optimisation", 1, "Repeat --lr_scheduler cosine_with_restarts this many times.", ge=1
    )
    lr_scheduler_power: float = option(
        "optimisation", 1.0, "Use this power in --lr_scheduler polynomial.", gt=0
    )
    lr_scheduler_timescale: int | None = option(
        "optimisation",
        None,
        "Use this time scale, in steps, in --lr_scheduler inverse_sqrt. By default it is the "
        "warm-up.",
        ge=1,
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        "optimisation",
        None,
        "End a cosine or warmup_stable_decay schedule at this share of the learning rate. By "
        "default it is 0.",
        ge=0,
        le=1,
    )
    lr_scheduler_type: str | None = option(
        "optimisation",
        None,
        "Use another schedule, given as module.Class or as a class of torch.optim.lr_scheduler; "
        "it replaces --lr_scheduler.",
    )
    lr_scheduler_args: list[str] = option(
        "optimisation", [], "Pass these arguments to --lr_scheduler_type, each as name=value."
    )
    max_train_steps: int = option(
        "optimisation", 1600, "Train for this many optimiser steps.", ge=1, common=True
    )
    max_train_epochs: int | None = option(
        "optimisation",
        None,
        "Train for this many passes over the data; it replaces --max_train_steps.",
        ge=1,
        common=True,
    )
    gradient_accumulation_steps: int = option(
        "optimisation",
        1,
        "Add up the gradients of this many batches before each optimiser step.",
        ge=1,
        common=True,
    )
    global_batch_size: int | None = option(
        "optimisation",
        None,
        "Make each optimiser step of this many images over all processes; "
        "--gradient_accumulation_steps then follows from it.",
        ge=1,
    )
    max_grad_norm: float = option(
        "optimisation", 1.0, "Clip the gradient norm to this value; 0 disables clipping.", ge=0
    )
    ema_decay: float = option(
        "optimisation",
        0.99,
        "Save an exponential moving average with this decay; 0 disables it.",
        ge=0,
        lt=1,
    )
    seed: int = option(
        "optimisation",
        0,
        "Draw the data order, the noise and the initial values with this seed.",
        ge=0,
        le=_LARGEST_SEED,
        common=True,
    )

    @field_validator("lr_warmup_steps", "lr_decay_steps")
    @classmethod
    def _whole_or_share(cls, value: float) -> int | float:
        if not math.isfinite(value) or (value >= 1 and value != int(value)):
            raise ValueError("expected a whole number of steps, or a share of all steps below 1")
        return value if value < 1 and value else int(value)
