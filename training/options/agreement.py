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
    every = (*rules, *_about_distilling(config), *_about_guidance(config))
    return [message for wrong, message in every if wrong]


def _about_distilling(config: TrainConfig) -> tuple[tuple[bool, str], ...]:
    """The rules of --objective distill."""
    distills = config.objective == "distill"
    cheaper = config.has_student or config.guidance_range is not None
    return (
        (
            config.choose_strength and (config.trains_base or config.mix == "prepend"),
            "--choose_strength needs values that are added to a frozen base, found --method "
            f"{config.method} and --mix {config.mix}: leave it out.",
        ),
        (
            not distills and (config.cache_teacher or config.states != "data"),
            "--cache_teacher and --states need --objective distill, found --objective "
            f"{config.objective}: give it.",
        ),
        (
            config.needs_no_pictures
            and (config.relative_loss or config.teacher_weighting == "relative"),
            "--relative_loss and --teacher_weighting relative need pictures, found captions or "
            "classes alone: use --teacher_weighting gap.",
        ),
        (
            config.objective == "own" and config.trains_base,
            "--objective own needs values that are added to a frozen base, found --method "
            f"{config.method}: use dmp, prompt or lora.",
        ),
        (
            config.objective == "two-sided" and config.method not in _PATCHES,
            "--objective two-sided needs a strength for each image, found --method "
            f"{config.method}: use dmp or prompt.",
        ),
        (
            config.uses_own_samples and config.mix == "prepend" and config.method in _PATCHES,
            "--objective own and two-sided need a patch that has a strength, found --mix prepend: "
            "use another.",
        ),
        (
            not distills and cheaper,
            "--student_quantization, --student_weights and --teacher_guidance_scale need "
            f"--objective distill, found --objective {config.objective}: give it.",
        ),
        (
            distills and not cheaper,
            "--objective distill needs a cheap call: give --student_quantization or "
            "--student_weights, or --teacher_guidance_scale for a call without guidance.",
        ),
        (
            distills and config.fsdp and not config.stores_predictions,
            "--fsdp shares out one model, and --objective distill calls the exact one in every "
            "step: give --cache_teacher.",
        ),
        (
            config.has_student and (config.fp8_base or config.int8_base),
            "--fp8_base and --int8_base store the exact model in 8 bits, which a repair is "
            "measured against: leave them out with --student_quantization and --student_weights.",
        ),
    )


def _about_guidance(config: TrainConfig) -> tuple[tuple[bool, str], ...]:
    """The rules of --teacher_guidance_scale."""
    scales = config.guidance_range
    ranged = scales is not None and scales[0] != scales[1]
    return (
        (
            ranged and config.has_student,
            "--teacher_guidance_scale must be one number for a cheap call with weights of its own, "
            f"because the strength is then that of the repair, found "
            f"{config.teacher_guidance_scale}: give one number.",
        ),
        (
            ranged and config.method not in _PATCHES,
            "--teacher_guidance_scale must be one number for a method without a strength for each "
            f"image, found {config.teacher_guidance_scale} with --method {config.method}: give one "
            "number.",
        ),
        (
            scales is not None and config.caption_dropout_rate > 0,
            "--teacher_guidance_scale trains conditional items alone, found "
            f"--caption_dropout_rate {config.caption_dropout_rate:g}: leave it out.",
        ),
    )
