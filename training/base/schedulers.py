"""What a diffusers scheduler says of its base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers

from dmp_common import Base, PatchError
from training.options.config import TrainConfig


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is of a flow model; it has no prediction type then."""
    return "FlowMatch" in type(scheduler).__name__


def token_side(base: Base) -> int:
    """Cells of the latent in a side of a token, of a transformer."""
    return min(site.stride for site in base.sites)


def token_count(sizes: Sequence[int], side: int) -> int:
    """How many tokens a transformer makes of a latent.

    Args:
        sizes: its height and width, and of a video the number of its frames before them.
        side: cells in a side of a token.
    """
    *frames, height, width = sizes
    return math.prod(frames) * (height // side) * (width // side)


def schedule_of(config: dict[str, Any]) -> Any:
    """The noise schedule that the configuration of any scheduler describes.

    Samplers of several orders (UniPC, in Wan's pipelines) have the shift of a flow model's noise
    levels under a name of their own.
    """
    cls: Any = diffusers.FlowMatchEulerDiscreteScheduler
    if "FlowMatch" in config.get("_class_name", ""):
        return cls.from_config(config)
    if config.get("prediction_type") == "flow_prediction":
        # By name: diffusers takes arguments by position for its defaults.
        return cls(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            shift=config.get("flow_shift") or 1.0,
        )
    return diffusers.DDPMScheduler.from_config(config)


def flux_shift(tokens: int) -> float:
    """Logarithm of the shift that Flux takes for a picture of so many tokens."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def dynamic_shift(scheduler: Any, tokens: int) -> float:
    """Logarithm of the shift that a scheduler's configuration gives a picture of so many tokens."""
    told = scheduler.config
    low, high = told.get("base_image_seq_len", 256), told.get("max_image_seq_len", 4096)
    least, most = told.get("base_shift", 0.5), told.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - low) / (high - low))


def adjusted(scheduler: Any, config: TrainConfig) -> Any:
    """Returns the scheduler with the wishes of the command line; None stays None.

    Raises:
        PatchError: wishes that a flow model cannot fulfil.
    """
    changes: dict[str, Any] = {}
    if config.v_parameterization:
        changes["prediction_type"] = "v_prediction"
    if config.zero_terminal_snr:
        changes["rescale_betas_zero_snr"] = True
    if scheduler is None or not changes:
        return scheduler
    require_adjustable(is_flow(scheduler), config)
    return type(scheduler).from_config(scheduler.config, **changes)


def require_adjustable(flow: bool, config: TrainConfig) -> None:
    """Refuses wishes about the noise schedule that a flow model cannot fulfil.

    Args:
        flow: whether the base is one.

    Raises:
        PatchError: it is one, and there are such wishes.
    """
    if flow and (config.v_parameterization or config.zero_terminal_snr):
        raise PatchError(
            "expected a base with epsilon or v prediction for --v_parameterization and "
            "--zero_terminal_snr, found a flow model: leave them out."
        )


def require_noise_prediction(flow: bool, base: str, what: str, remedy: str) -> None:
    """Refuses for a flow model what goes by the noise that a base predicts.

    Args:
        flow: whether the base is one.
        base: its name, for the error.
        what: it is.
        remedy: the end of the error.

    Raises:
        PatchError: it is one.
    """
    if flow:
        raise PatchError(
            f"expected a base that predicts noise or v for {what}, found {base}, a flow model: "
            f"{remedy}"
        )
