"""Going on with an earlier run: the same data, base and options, or a sentence that names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmp_common import PatchError
from training.methods.patch import PatchMethod
from training.options.config import TrainConfig
from training.options.helping import section_of
from training.run.parts import Run
from training.run.state import State, restore_random

# Options whose change is what a user asks for, and takes effect.
APPLIED = (
    *("learning_rate", "gate_lr_factor", "weight_decay", "max_grad_norm"),
    *("lr_scheduler", "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"),
    *("lr_scheduler_type", "lr_scheduler_args", "lr_scheduler_min_lr_ratio", "lr_decay_steps"),
    "lr_scheduler_timescale",
    *("max_train_steps", "max_train_epochs", "mixed_precision"),
)
# Sections whose options change what a run leaves or how fast it is, not what it learns.
_FREE_SECTIONS = (
    *("output", "previews", "validation", "logging", "hub", "run", "precision and scale"),
    *("loading", "data"),
)
# Compared as facts of the base and the data themselves, wherever they lie; or only chosen by.
_COMPARED_AS_FACTS = (
    *("base", "pretrained_model_name_or_path", "base_config", "vae", "text_encoder"),
    *("recipe", "train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("network_weights", "sdpa"),
)


def facts_of(run: Run, weights: str) -> dict[str, Any]:
    """What a continuation must have in common with the run it continues.

    Args:
        weights: fingerprint of base weights, from before anything was trained in them.
    """
    config, encoders = run.config, run.encoders
    facts: dict[str, Any] = {
        "base": run.frozen.base.name,
        "method": config.method,
        "optimizer_type": config.optimizer_type,
        "seed": config.seed,
        "images of a step": run.per_step,
        "images at once": run.at_once,
        "images": run.data.size,
        "values": sum(p.numel() for p in run.method.trainable().values()),
        "fingerprint of data": run.data.fingerprint(),
        "fingerprint of base weights": weights,
        "fingerprint of VAE": encoders.image_fingerprint,
        "fingerprint of text encoders": encoders.text_fingerprint,
        "options": _deciding(config),
    }
    if isinstance(run.method, PatchMethod):
        facts["variant"] = run.method.patch.variant.to_json()
    return facts


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The options that decide what a run learns."""
    fields = TrainConfig.model_fields
    return {
        name: value
        for name, value in config.recorded().items()
        if name not in _COMPARED_AS_FACTS
        and (name in APPLIED or section_of(fields[name]) not in _FREE_SECTIONS)
    }


def resume(run: Run, state: State, facts: Mapping[str, Any], folder: Path) -> None:
    """Puts a run where a state left it, and says which options have changed.

    Raises:
        PatchError: the state is that of another run, or of one with more steps.
    """
    require_same(folder, state, facts)
    if state.step > run.total:
        raise PatchError(
            f"expected a state of at most {run.total} steps, found {state.step} done in {folder}: "
            "raise --max_train_steps, or name an earlier state."
        )
    wanted = [dict(group) for group in run.optimiser.param_groups]
    restore(run, state)
    before, now = state.facts.get("options", {}), facts["options"]
    changed = [name for name in APPLIED if name in before and before[name] != now.get(name)]
    if set(changed) & {"learning_rate", "gate_lr_factor", "weight_decay"}:
        _use_rates(run, wanted)
    if run.accelerator.is_main_process:
        print(f"resumed after step {state.step} from {folder.as_posix()}")
        for name in changed:
            print(f"from here on --{name} is {now[name]} (it was {before[name]})")


def require_same(folder: Path, state: State, facts: Mapping[str, Any]) -> None:
    """Refuses to continue with the state of another run.

    Facts that an earlier version did not write are not compared.

    Raises:
        PatchError: a fact of the state is not that of this run.
    """
    differs = [
        f"other {name.removeprefix('fingerprint of ')}"
        if name.startswith("fingerprint of ")
        else f"{name} {state.facts[name]!r} (now {value!r})"
        for name, value in facts.items()
        if name != "options" and name in state.facts and state.facts[name] != value
    ]
    before, now = state.facts.get("options", {}), facts.get("options", {})
    differs += [
        f"--{name} {before[name]!r} (now {value!r})"
        for name, value in now.items()
        if name in before and name not in APPLIED and before[name] != value
    ]
    if differs:
        raise PatchError(
            f"expected the state of this run at {folder}, found one with {', '.join(differs)}: "
            "give the options, data and base of that run, or begin a new one without --resume; "
            f"only {', '.join('--' + name for name in APPLIED[:2])}, the length, the schedule and "
            "the precision may change."
        )


def restore(run: Run, state: State) -> None:
    """Puts a state's values into a run that was assembled like the one that left it."""
    own = run.method.trainable()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state.values[name])
    plain_optimiser(run.optimiser).load_state_dict(state.rest["optimiser"])
    run.schedule.load_state_dict(state.rest["schedule"])
    run.average.load_state_dict(state.rest["average"])
    if run.accelerator.scaler is not None and state.rest["scaler"]:
        run.accelerator.scaler.load_state_dict(state.rest["scaler"])
    run.step, run.position, run.history = state.step, state.position, state.history
    run.best = state.best
    restore_random(state.rest["random"])


def _use_rates(run: Run, wanted: list[dict[str, Any]]) -> None:
    """Gives the groups the rates that are asked for now, at the place in the schedule."""
    for group, new in zip(run.optimiser.param_groups, wanted, strict=True):
        old = group.get("initial_lr", group["lr"])
        rate = new.get("initial_lr", new["lr"])
        group["lr"] = group["lr"] * rate / old if old else rate
        group["initial_lr"], group["weight_decay"] = rate, new.get("weight_decay", 0.0)
    if hasattr(run.schedule, "base_lrs"):
        run.schedule.base_lrs = [group["initial_lr"] for group in run.optimiser.param_groups]


def plain_optimiser(optimiser: Any) -> torch.optim.Optimizer:
    """The optimiser itself, from what accelerate makes of it."""
    inner: torch.optim.Optimizer = getattr(optimiser, "optimizer", optimiser)
    return inner
