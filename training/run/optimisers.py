"""Optimisers and learning rates by name; each optimiser's package is imported when it is used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import optimization as diffusers_schedules
from transformers import optimization as transformers_schedules

from dmp_common import PatchError
from training.options.config import TrainConfig

# Name, as kohya has it: class, and the package to install.
OPTIMISERS: dict[str, tuple[str, str]] = {
    "AdamW": ("torch.optim.AdamW", "torch"),
    "Adam": ("torch.optim.Adam", "torch"),
    "SGDNesterov": ("torch.optim.SGD", "torch"),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "PagedAdamW": ("bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
    "PagedAdamW32bit": ("bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes"),
    "SGDNesterov8bit": ("bitsandbytes.optim.SGD8bit", "bitsandbytes"),
    "AdEMAMix8bit": ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes"),
    "PagedAdEMAMix8bit": ("bitsandbytes.optim.PagedAdEMAMix8bit", "bitsandbytes"),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "PagedLion8bit": ("bitsandbytes.optim.PagedLion8bit", "bitsandbytes"),
    "Lion": ("lion_pytorch.Lion", "lion-pytorch"),
    "Adafactor": ("transformers.optimization.Adafactor", "transformers"),
    "Prodigy": ("prodigyopt.Prodigy", "prodigyopt"),
    "DAdaptation": ("dadaptation.DAdaptAdam", "dadaptation"),
    "DAdaptAdam": ("dadaptation.DAdaptAdam", "dadaptation"),
    "DAdaptAdaGrad": ("dadaptation.DAdaptAdaGrad", "dadaptation"),
    "DAdaptAdan": ("dadaptation.DAdaptAdan", "dadaptation"),
    "DAdaptLion": ("dadaptation.DAdaptLion", "dadaptation"),
    "DAdaptSGD": ("dadaptation.DAdaptSGD", "dadaptation"),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", "schedulefree"),
    "RAdamScheduleFree": ("schedulefree.RAdamScheduleFree", "schedulefree"),
    "SGDScheduleFree": ("schedulefree.SGDScheduleFree", "schedulefree"),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SGDNesterov": {"momentum": 0.9, "nesterov": True},
    "SGDNesterov8bit": {"momentum": 0.9, "nesterov": True},
    # kohya's way: a fixed rate rather than Adafactor's own.
    "Adafactor": {"scale_parameter": False, "relative_step": False, "warmup_init": False},
}
_ADAPTIVE = ("Prodigy", "DAdapt")  # they find the rate themselves, around 1
# The same optimisers with ordinary states, for machines without a GPU or without bitsandbytes.
PLAIN = {
    **dict.fromkeys(("AdamW8bit", "PagedAdamW8bit", "PagedAdamW", "PagedAdamW32bit"), "AdamW"),
    **dict.fromkeys(("Lion8bit", "PagedLion8bit"), "Lion"),
    "SGDNesterov8bit": "SGDNesterov",
}


def make_optimiser(config: TrainConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of --optimizer_type with --optimizer_args.

    Raises:
        PatchError: an unknown name, a missing package, or arguments it does not take.
    """
    name = optimiser_name(config.optimizer_type)
    path, package = OPTIMISERS.get(name, (name, name.split(".")[0]))
    cls = _find(path, package, "optimizer_type")
    options = {
        "weight_decay": config.weight_decay,
        **_DEFAULTS.get(name, {}),
        **_arguments(config.optimizer_args, "optimizer_args"),
    }
    warmup = steps_of(config.lr_warmup_steps, config.max_train_steps)
    if name.endswith("ScheduleFree") and "RAdam" not in name and warmup:
        options.setdefault("warmup_steps", warmup)
    try:
        optimiser: torch.optim.Optimizer = cls(list(groups), lr=config.learning_rate, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise PatchError(
            f"expected arguments that {name} takes, found {options} ({error}): change "
            "--optimizer_args or --learning_rate."
        ) from error
    if name.startswith(_ADAPTIVE) and config.learning_rate < 0.1:
        print(
            f"note: {name} finds the learning rate itself and wants --learning_rate 1, found "
            f"{config.learning_rate:g}"
        )
    return optimiser


def is_schedule_free(optimiser: Any) -> bool:
    """Whether the optimiser must be told when its values are used and when they are trained."""
    inner = getattr(optimiser, "optimizer", optimiser)
    return "ScheduleFree" in type(inner).__name__


def optimiser_name(written: str) -> str:
    """The name of an optimiser in the spelling of `OPTIMISERS`; others as they are."""
    return {name.lower(): name for name in OPTIMISERS}.get(written.lower(), written)


def has_package(name: str) -> bool:
    """Whether the package of an optimiser in `OPTIMISERS` is installed."""
    return importlib.util.find_spec(OPTIMISERS[name][0].split(".")[0]) is not None


def steps_of(number: float, total: int) -> int:
    """Steps of a number that may be a share of all steps.

    >>> steps_of(50, 1000), steps_of(0.05, 1000)
    (50, 50)
    """
    return round(number * total) if number < 1 else int(number)


def make_schedule(config: TrainConfig, optimiser: Any, steps: int) -> Any:
    """The learning rate schedule over `steps` optimiser steps.

    Source: `diffusers.optimization`, and for the schedules that it does not have
    `transformers.optimization`.

    Raises:
        PatchError: a class of --lr_scheduler_type that there is not, or arguments it does not take.
    """
    free = is_schedule_free(optimiser)
    optimiser = getattr(optimiser, "optimizer", optimiser)
    if free:
        return diffusers_schedules.get_scheduler("constant", optimiser)
    if config.lr_scheduler_type is not None:
        return _own_schedule(config, optimiser)
    warmup = steps_of(config.lr_warmup_steps, steps)
    lowest = config.lr_scheduler_min_lr_ratio
    name = (
        "cosine_with_min_lr"
        if config.lr_scheduler == "cosine" and lowest
        else (config.lr_scheduler)
    )
    match name:
        case "cosine_with_min_lr":
            return transformers_schedules.get_cosine_with_min_lr_schedule_with_warmup(
                optimiser, warmup, steps, min_lr_rate=lowest or 0.0
            )
        case "warmup_stable_decay":
            decay = steps_of(config.lr_decay_steps, steps)
            return transformers_schedules.get_wsd_schedule(
                optimiser,
                num_warmup_steps=warmup,
                num_stable_steps=max(0, steps - warmup - decay),
                num_decay_steps=decay,
                min_lr_ratio=lowest or 0.0,
            )
        case "inverse_sqrt":
            timescale = config.lr_scheduler_timescale or warmup or None
            return transformers_schedules.get_inverse_sqrt_schedule(optimiser, warmup, timescale)
    special: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": config.lr_scheduler_num_cycles},
        "polynomial": {"power": config.lr_scheduler_power},
    }
    return diffusers_schedules.get_scheduler(
        name,
        optimiser,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        **special.get(name, {}),
    )


def _own_schedule(config: TrainConfig, optimiser: Any) -> Any:
    """The schedule of --lr_scheduler_type with --lr_scheduler_args."""
    path = str(config.lr_scheduler_type)
    path = path if "." in path else f"torch.optim.lr_scheduler.{path}"
    cls = _find(path, path.split(".")[0], "lr_scheduler_type")
    options = _arguments(config.lr_scheduler_args, "lr_scheduler_args")
    try:
        return cls(optimiser, **options)
    except (TypeError, ValueError) as error:
        raise PatchError(
            f"expected arguments that {path} takes, found {options} ({error}): change "
            "--lr_scheduler_args."
        ) from error


def _find(path: str, package: str, option: str) -> Any:
    """The class of a path such as torch.optim.AdamW."""
    module, _, name = path.rpartition(".")
    if not module:
        raise PatchError(
            f"expected one of the optimisers {', '.join(OPTIMISERS)}, or module.Class, found "
            f"{path!r}: change --{option}."
        )
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise PatchError(
            f"expected the package {package} for --{option} {name}, found none: pip install "
            f"{package}."
        ) from error
    except AttributeError as error:
        raise PatchError(
            f"expected a class {name} in {module}, found none: change --{option}."
        ) from error


def _arguments(entries: Sequence[str], option: str) -> dict[str, Any]:
    """`name=value` each; values are Python's numbers, tuples, True, None, else text."""
    options: dict[str, Any] = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not sign or not name.strip().isidentifier():
            raise PatchError(
                f"expected --{option} as name=value, found {entry!r}: for example betas=(0.9,0.99)."
            )
        try:
            options[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = value.strip()
    return options
