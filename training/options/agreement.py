"""Which options do not go together. Each rule here is one sentence of the report."""

from __future__ import annotations

from training.options.config import TrainConfig

_PATCHES = ("dmp", "prompt")
_WITH_MINIMUM = ("cosine", "cosine_with_min_lr", "warmup_stable_decay")


def disagreements(config: TrainConfig) -> list[str]:
    """What is wrong between the options of a configuration, a sentence each."""
    weights = ("min_snr_gamma", "debiased_estimation_loss", "p2_gamma")
    given = [f"--{name}" for name in weights if getattr(config, name)]
    rules = (
        (
            config.dmp_depth is not None and config.dmp_sites is not None,
            "--dmp_depth and --dmp_sites both choose the block inputs: give one of them.",
        ),
        (
            config.min_timestep >= config.max_timestep,
            f"--min_timestep must be below --max_timestep, found {config.min_timestep} and "
            f"{config.max_timestep}: change one of them.",
        ),
        (
            config.grid_scope == "site" and (config.prompt_scale, config.method) == ("mean", "dmp"),
            "--grid_scope site needs --prompt_scale literal, because the mean weight of a prompt "
            "differs between its block inputs: give both.",
        ),
        (
            config.network_weights is not None and config.method not in _PATCHES,
            "--network_weights names a patch to initialise from, and needs --method dmp or prompt, "
            f"found {config.method}: leave one of them out.",
        ),
        (len(given) > 1, f"{' and '.join(given)} exclude each other: give one of them."),
        (
            config.text_conditional and config.unconditional,
            "--text_conditional and --unconditional exclude each other: give one of them.",
        ),
        (
            bool(config.lr_scheduler_args) and config.lr_scheduler_type is None,
            "--lr_scheduler_args needs --lr_scheduler_type, found none: name the class.",
        ),
        (
            bool(config.lr_scheduler_min_lr_ratio)
            and config.lr_scheduler not in _WITH_MINIMUM
            and config.lr_scheduler_type is None,
            f"--lr_scheduler_min_lr_ratio needs --lr_scheduler {', '.join(_WITH_MINIMUM[:-1])} or "
            f"{_WITH_MINIMUM[-1]}, found {config.lr_scheduler}: change one of them.",
        ),
    )
    return [message for wrong, message in rules if wrong]
