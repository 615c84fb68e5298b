"""What suits a base or recipe better than the general defaults, and which recipe is the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.options.config import TrainConfig
from training.options.data_options import SOURCES

# Ours, see docs/RESULTS.md: the patch, and how it is trained.
STAGES: dict[str, Any] = {"grids": 4, "gate_unit": "grid", "gate_form": "residual"}
_STAGES = {**STAGES, "gate_lr_factor": 1.0, "max_timestep": 1000, "relative_loss": True}
# The same with an off switch for the noisy half, and a gate that hardly leaves its beginning.
CLEAN: dict[str, Any] = {**STAGES, "gate_lr_factor": 0.01, "max_timestep": 500}
_CLEAN = {**CLEAN, "relative_loss": False}
_WANS = ("wan-1.3b", "wan-14b", "wan22-5b", "wan21-i2v-14b", "wan22-i2v-14b")
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
    **{name: {"train_batch_size": 1} for name in ("flux", "qwen-image", "z-image", "lumina2")},
    "ernie-image": {"train_batch_size": 1},
    **{name: {"train_batch_size": 1} for name in ("chroma", "krea2", "qwen-image-2.1", "anima")},
    **{f"flux2{name}": {"train_batch_size": 1} for name in ("", "-klein-4b", "-klein-9b")},
    **{name: {"train_batch_size": 1} for name in _WANS},
    **{
        f"dit-{size}/{tokens}": {"train_batch_size": 16}
        for size in ("s", "b", "l", "xl")
        for tokens in (2, 4, 8)
    },
}
# The usual scale of classifier-free guidance, for --recipe guidance; Flux is told its scale.
GUIDANCE: dict[str, float] = {
    "digits": 2.0,
    "cifar10-s": 2.0,
    **dict.fromkeys(("sd15", "sd21", "sdxl"), 7.5),
    "pixart": 4.5,
    **dict.fromkeys(("sd3", "sd35-medium", "sd35-large"), 7.0),
    **dict.fromkeys(("qwen-image", "lumina2", "anima"), 4.0),
    "ernie-image": 4.0,
    "chroma": 5.0,
    "krea2": 5.5,
    "z-image": 5.0,  # Turbo, the usual weights, is refused
    **dict.fromkeys(("flux2-klein-4b", "flux2-klein-9b"), 4.0),  # distilled ones are refused
    **dict.fromkeys(_WANS, 5.0),
    **dict.fromkeys(("auraflow", "hunyuan-image"), 3.5),
    **dict.fromkeys(("sana", "sana-0.6b"), 4.5),
    **{f"dit-{size}/{tokens}": 4.0 for size in ("s", "b", "l", "xl") for tokens in (2, 4, 8)},
}
# What --method dmp is on a base where another variant than the paper's was shown to be better.
VARIANTS: dict[str, dict[str, Any]] = {"digits": _STAGES, "cifar10-s": _CLEAN}

# Measured on the digits and cifar10-s, see docs/RESULTS.md, "Cheap calls"; rates between 0.005 and
# 0.01 were level there.
_DISTILL: dict[str, Any] = {
    "objective": "distill",
    "teacher_weighting": "gap",
    "mix": "modulate",
    "dmp_sites": "modulated",
    "learning_rate": 5e-3,
    "max_train_steps": 1000,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 50,
    "ema_decay": 0.0,
    "importance_weight": 0.0,
    "load_weight": 0.0,
    "validation_draws": 1,
    "keep_best": True,
}
# Ham et al. 2025, section 5 and the official code: AdamW with a constant rate on the prompts
# themselves, ten times it on gate and noise; 50,000 steps of 128 images.
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
        "max_train_steps": 50_000,
        "max_grad_norm": 0.0,
        "global_batch_size": 128,
        "importance_weight": 1.0,
        "load_weight": 1.0,
        "gate_noise": True,
        "ema_decay": 0.0,
        "grids": 1,
        "gate_unit": "prompt",
        "gate_form": "softmax",
        "max_timestep": 1000,
        "relative_loss": False,
    },
    "stages": _STAGES,
    "clean": _CLEAN,
    # The weights of a model that was rounded: see docs/RECIPES.md.
    "repair": _DISTILL,
    # One call a step in the place of two.
    "guidance": _DISTILL,
}
# What a base wants of a recipe otherwise; "repair" on the digits is the quickstart, which takes
# 58 seconds of one CPU core.
SUITED: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "repair"): {
        "learning_rate": 1e-2,
        "max_train_steps": 200,
        "train_batch_size": 64,
        "lr_warmup_steps": 20,
        "max_validation_images": 100,
        "report_samples": 200,
    },
}


def default_recipe(chosen: Mapping[str, Any]) -> str:
    """The recipe where the user names none.

    Distillation has recipes of its own. A base for which a variant of ours was measured to be
    better has its own settings; for all others nothing is known to be better than what the paper
    did.
    """
    if chosen.get("objective") == "distill":
        guided = bool(chosen.get("teacher_guidance_scale"))
        return "guidance" if guided and not has_student(chosen) else "repair"
    return "none" if str(chosen.get("base", "auto")) in VARIANTS else "paper"


def suggestions(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the preset and recipe for the options that a user chose; the chosen ones win."""
    base = str(chosen.get("base", "auto"))
    found = dict(PRESETS.get(base, {}))
    if any(chosen.get(name) for name in SOURCES):
        found.pop("dataset_name", None)  # other data were asked for
    recipe = str(chosen.get("recipe") or default_recipe(chosen))
    of_recipe = {**_settings(recipe, base), "recipe": recipe}
    distills = {**of_recipe, **chosen}.get("objective") == "distill"
    if chosen.get("method", "dmp") == "dmp" and not distills:
        found |= VARIANTS.get(base, {})
    if recipe == "guidance":
        of_recipe["teacher_guidance_scale"] = _usual_guidance(base, chosen)
    if {**of_recipe, **chosen}.get("teacher_guidance_scale"):
        of_recipe["caption_dropout_rate"] = 0.0  # the cheap call is the conditional one alone
    if {**of_recipe, **chosen}.get("mix") != "modulate":
        of_recipe.pop("dmp_sites", None)  # those of a patch that adds are other places
    found |= of_recipe
    if chosen.get("objective") in ("own", "two-sided"):
        found["keep_best"] = False  # away from the base's samples the held-out loss rises
    # Who says how many images make a step is not overruled by a recipe that nobody named: with
    # kohya's scripts --train_batch_size says it, and 128 times as much would be a surprise.
    own = chosen.get("gradient_accumulation_steps") or (
        chosen.get("train_batch_size") and not chosen.get("recipe")
    )
    if own and not chosen.get("global_batch_size"):
        found.pop("global_batch_size", None)
    if chosen.get("logging_dir"):
        found["log_with"] = "tensorboard"  # as kohya has it
    return found


def _settings(recipe: str, base: str) -> dict[str, Any]:
    """What a recipe sets for a base."""
    return {**RECIPES.get(recipe, {}), **SUITED.get((base, recipe), {})}


def has_student(chosen: Mapping[str, Any]) -> bool:
    """Whether options ask for a cheap call with weights of its own."""
    return any(chosen.get(name) for name in ("student_quantization", "student_weights"))


def _usual_guidance(base: str, chosen: Mapping[str, Any]) -> str | None:
    """The scales of --recipe guidance: a range where the strength can be the dial of guidance."""
    usual = GUIDANCE.get(base)
    if usual is None:
        return None
    dial = chosen.get("method", "dmp") in ("dmp", "prompt") and not has_student(chosen)
    return f"1:{usual:g}" if dial else f"{usual:g}"


def recipe_lines(config: TrainConfig) -> list[str]:
    """Which recipe a run follows, why, what it costs, and what the user changed of it."""
    recipe = str(config.recipe or "none")
    chosen = config.model_fields_set
    if "recipe" in chosen:
        why = "as you asked"
    elif recipe == "paper":
        why = f"since none was shown to be better on {config.base}; --recipe none: plain defaults"
    elif recipe in ("repair", "guidance"):
        why = "the one of --objective distill; --recipe none: plain defaults"
    else:
        why = f"the settings of {config.base} are its own, measured in docs/RESULTS.md"
    lines = [f"recipe: {recipe}, {why}", f"  {_cost(config)}"]
    values = {**PRESETS.get(config.base, {}), **_settings(recipe, config.base)}
    changed = [
        f"{name} {getattr(config, name)} instead of {value}"
        for name, value in values.items()
        if name in chosen and getattr(config, name) != value
    ]
    if changed:
        lines.append(f"  changed by you: {', '.join(changed)}")
    return lines


def _cost(config: TrainConfig) -> str:
    """Steps times images, as far as they are known before the data are read."""
    images = config.global_batch_size
    each = (
        f"{images} images"
        if images
        else (f"{config.train_batch_size * config.gradient_accumulation_steps} images a process")
    )
    if config.max_train_epochs is not None:
        return f"{config.max_train_epochs} epochs, in steps of {each}"
    count = images or config.train_batch_size * config.gradient_accumulation_steps
    return (
        f"{config.max_train_steps:,} steps of {each}: {config.max_train_steps * count:,} images "
        "pass through the base"
    )
