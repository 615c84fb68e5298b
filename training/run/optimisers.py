"""Optimisers and learning rates by name; each optimiser's package is imported when it is used."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from dmp_common import PatchError
from training.options.config import TrainConfig

# Name, as kohya has it: class, and the package to install.
OPTIMISERS: dict[str, tuple[str, str]] = {
    "AdamW": ("torch.optim.AdamW", "torch"),
    "Adam": ("torch.optim.Adam", "torch"),
    "SGDNesterov": ("torch.optim.SGD", "torch"),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "Lion": ("lion_pytorch.Lion", "lion-pytorch"),
    "Adafactor": ("transformers.optimization.Adafactor", "transformers"),
    "Prodigy": ("prodigyopt.Prodigy", "prodigyopt"),
    "DAdaptAdam": ("dadaptation.DAdaptAdam", "dadaptation"),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", "schedulefree"),
    "SGDScheduleFree": ("schedulefree.SGDScheduleFree", "schedulefree"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SGDNesterov": {"momentum": 0.9, "nesterov": True},
    # kohya's way: a fixed rate rather than Adafactor's own.
    "Adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
}
_ADAPTIVE = ("Prodigy", "DAdaptAdam")  # they find the rate themselves, around 1


def make_optimiser(config: TrainConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of --optimizer_type with --optimizer_args.

    Raises:
        PatchError: an unknown name, a missing package, or arguments it does not take.
    """
    known = {name.lower(): name for name in OPTIMISERS}
    name = known.get(config.optimizer_type.lower(), config.optimizer_type)
    path, package = OPTIMISERS.get(name, (name, name.split(".")[0]))
    cls = _find(path, package)
    options = {
        "weight_decay": config.weight_decay,
        **_DEFAULTS.get(name, {}),
        **_arguments(config.optimizer_args),
    }
    if name.endswith("ScheduleFree") and config.lr_warmup_steps:
        options.setdefault("warmup_steps", config.lr_warmup_steps)
    try:
        optimiser: torch.optim.Optimizer = cls(list(groups), lr=config.learning_rate, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise PatchError(
            f"expected arguments that {name} takes, found {options} ({error}): change "
            "--optimizer_args or --learning_rate."
        ) from error
    if name in _ADAPTIVE and config.learning_rate < 0.1:
        print(
            f"note: {name} finds the learning rate itself and wants --learning_rate 1, found "
            f"{config.learning_rate:g}"
        )
    return optimiser


def is_schedule_free(optimiser: Any) -> bool:
    """Whether the optimiser must be told when its values are used and when they are trained."""
    inner = getattr(optimiser, "optimizer", optimiser)
    return "ScheduleFree" in type(inner).__name__


def make_schedule(config: TrainConfig, optimiser: Any, steps: int) -> Any:
    """The learning rate schedule over `steps` optimiser steps.

    Raises:
        PatchError: a schedule for an optimiser that has none.
    """
    name = "constant" if is_schedule_free(optimiser) else config.lr_scheduler
    special = {
        "cosine_with_restarts": {"num_cycles": config.lr_scheduler_num_cycles},
        "polynomial": {"power": config.lr_scheduler_power},
    }
    return get_scheduler(
        name,
        getattr(optimiser, "optimizer", optimiser),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        **special.get(name, {}),
    )


def _find(path: str, package: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        raise PatchError(
            f"expected one of the optimisers {', '.join(OPTIMISERS)}, or module.Class, found "
            f"{path!r}: change --optimizer_type."
        )
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise PatchError(
            f"expected the package {package} for optimiser {name}, found none: pip install "
            f"{package}."
        ) from error
    except AttributeError as error:
        raise PatchError(
            f"expected an optimiser {name} in {module}, found none: change --optimizer_type."
        ) from error


def _arguments(entries: Sequence[str]) -> dict[str, Any]:
    """`name=value` each; values are Python's numbers, tuples, True, None, else text."""
    options: dict[str, Any] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not sign or not name.strip().isidentifier():
            raise PatchError(
                f"expected --optimizer_args as name=value, found {entry!r}: for example "
                "betas=(0.9,0.99)."
            )
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = value.strip()
    return options
