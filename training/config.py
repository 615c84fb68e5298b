"""The trainer's configuration: one pydantic model, which also makes the command line.

Names are kohya's wherever kohya has the thing. A value comes from the command line, else from
the preset of the base, else from the default here.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from training.options import option

# What suits a base better than the general default; measured, see training/digits/README.md.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "learning_rate": 3e-3,
        "max_train_steps": 1000,
        "train_batch_size": 128,
        "lr_warmup_steps": 50,
        "validate_every_n_steps": 200,
    },
}


class TrainConfig(BaseModel):
    """Everything one run depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = option("model", "digits", "the base to train for; today: digits")
    pretrained_model_name_or_path: str | None = option(
        "model", None, "folder of the base's weights (default: the base's own)"
    )

    dmp_sites: str | None = option(
        "patch", None, "all, a named set (encoder, decoder, blocks) or names joined by commas"
    )
    dmp_depth: int | None = option("patch", None, "use the first k sites only", ge=1)
    grid: int | None = option("patch", None, "rows and columns of the prompt grid", ge=1, le=256)
    gate: Literal["linear", "attention", "none"] = option(
        "patch", "linear", "what weights the prompts; none is naive prompt tuning"
    )
    selection: Literal["soft", "hard"] = option("patch", "soft", "soft weights, or the top 75 %%")
    across_depth: Literal["distinct", "uniform"] = option(
        "patch", "distinct", "whether the gate sees the depth of a site"
    )
    mix: Literal["add", "prepend"] = option("patch", "add", "how prompts join the input")
    condition: Literal["t", "t+y"] = option("patch", "t", "what the gate sees")
    prompt_init: Literal["zero", "random"] = option("patch", "zero", "how prompts begin")
    gate_init: Literal["zero", "random"] = option("patch", "zero", "how the gate begins")

    train_batch_size: int = option("data", 64, "images of one step and process", ge=1)
    max_data_loader_n_workers: int = option("data", 0, "processes that load data", ge=0)
    caption_dropout_rate: float = option(
        "data", 0.1, "share of images trained without their label or caption", ge=0, le=1
    )

    learning_rate: float = option(
        "optimisation", 1e-3, "of the prompts at mean weight 1 (DESIGN: p / N is learned)", gt=0
    )
    gate_lr_factor: float = option(
        "optimisation", 1.0, "learning rate of the gate over that of the prompts", gt=0
    )
    weight_decay: float = option("optimisation", 0.0, "of AdamW", ge=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option(
        "optimisation", "cosine", "how the learning rate changes"
    )
    lr_warmup_steps: int = option("optimisation", 0, "steps of rising learning rate", ge=0)
    max_train_steps: int = option("optimisation", 1600, "optimiser steps", ge=1)
    gradient_accumulation_steps: int = option("optimisation", 1, "batches of a step", ge=1)
    gradient_checkpointing: bool = option("optimisation", False, "less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "optimisation", "no", "arithmetic of the frozen base; the patch stays float32"
    )
    max_grad_norm: float = option("optimisation", 1.0, "longest gradient, 0 for any", ge=0)
    ema_decay: float = option(
        "optimisation", 0.99, "of the averaged patch that is saved, 0 for none", ge=0, lt=1
    )
    importance_weight: float = option("optimisation", 0.0, "of the importance loss", ge=0)
    load_weight: float = option("optimisation", 0.0, "of the load loss", ge=0)
    balancing_timesteps: int = option(
        "optimisation", 16, "timesteps the balancing losses are evaluated on", ge=16
    )

    output_dir: str = option("output", "output/{base}", "folder of everything a run leaves")
    output_name: str = option("output", "{base}-dmp", "name of the patch, without ending")
    save_precision: Literal["float", "fp16", "bf16"] = option("output", "float", "of the file")
    validate_every_n_steps: int = option(
        "output", 200, "steps between validations; the best patch is kept", ge=1
    )
    report_samples: int = option(
        "output", 2000, "generated images to judge by (rounded up), 0 for no report", ge=0
    )
    seed: int = option("output", 0, "of data order, noise and initial values", ge=0)

    @property
    def variant(self) -> dict[str, Any]:
        """The options of `Patch.create`."""
        names = ("gate", "selection", "across_depth", "mix", "condition", "prompt_init")
        options: dict[str, Any] = {name: getattr(self, name) for name in (*names, "gate_init")}
        if self.grid is not None:
            options["grid"] = self.grid
        if self.dmp_depth is not None:
            options["sites"] = self.dmp_depth
        elif self.dmp_sites is not None:
            named = self.dmp_sites.split(",")
            options["sites"] = named if len(named) > 1 or "." in named[0] else named[0]
        return options

    def model_post_init(self, _: Any) -> None:
        """Fills the name of the base into the names that hold a place for it."""
        place = self.base.replace("/", "-")
        for name in ("output_dir", "output_name"):
            object.__setattr__(self, name, getattr(self, name).replace("{base}", place))


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration a command line asks for; exits with a message where it is wrong."""
    parser = _parser()
    found, unknown = parser.parse_known_args(arguments)
    for name in (entry.split("=")[0] for entry in unknown if entry.startswith("--")):
        near = difflib.get_close_matches(name.strip("-"), TrainConfig.model_fields, n=1)
        hint = f", did you mean --{near[0]}?" if near else ", see --help"
        parser.error(f"unknown option {name}{hint}")
    if unknown:
        parser.error(f"expected options that begin with --, found {unknown[0]!r}")
    given = vars(found)
    if given.get("dmp_depth") and given.get("dmp_sites"):
        parser.error("--dmp_depth and --dmp_sites both choose the sites: give one of them")
    preset = PRESETS.get(given.get("base", TrainConfig.model_fields["base"].default), {})
    try:
        return TrainConfig(**{**preset, **given})
    except ValidationError as error:
        first = error.errors()[0]
        parser.error(f"--{first['loc'][0]}: {first['msg']}, found {first['input']!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_dmp.py",
        usage="%(prog)s --base NAME [options]",
        description="Trains a DMP patch for a frozen diffusion model.",
        epilog="Example: python training/train_dmp.py --base digits --output_dir output/try",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for name, info in TrainConfig.model_fields.items():
        section = info.json_schema_extra["section"]  # type: ignore[index, call-overload]
        if section not in groups:
            groups[section] = parser.add_argument_group(str(section))
        _addoption(groups[str(section)], name, info)
    return parser


def _addoption(group: Any, name: str, info: FieldInfo) -> None:
    options: dict[str, Any] = {"help": f"{info.description} (default: {info.default})"}
    if info.annotation is bool:
        options["action"] = "store_true"
    else:
        kinds = [kind for kind in get_args(info.annotation) if isinstance(kind, type)]
        choices = [kind for kind in get_args(info.annotation) if isinstance(kind, str)]
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = (kinds[0] if kinds else info.annotation).__name__.upper()
    # Absent options stay absent, so that a preset is not overruled by a default.
    group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
