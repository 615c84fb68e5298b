"""What a file says of its purpose: the entry dmp.use, which informs and changes nothing."""

from __future__ import annotations

from typing import Any

from dmp_common.attach.compatibility import zero_terminal_snr_of_scheduler
from training.base.cheap import student_facts
from training.base.frozen import FrozenBase
from training.options.config import TrainConfig
from training.run.repair import RepairVerdict
from training.run.verdict import Verdict, interval_json


def purpose_of(config: TrainConfig, frozen: FrozenBase) -> dict[str, Any]:
    """What a run trains for, as far as it is known before training.

    Args:
        config: of the run.
        frozen: the base of the cheap call, which the method is on.

    Returns:
        "objective"; "zero_terminal_snr", of a noise schedule that could have it; with own samples
        how many and how they were drawn; and where it is distill "exact" and "cheap", which say
        what both calls are, "states", where their predictions were compared, and "weights", of the
        timesteps.
    """
    told: dict[str, Any] = {"objective": config.objective}
    if frozen.scheduler is not None and frozen.prediction != "flow":
        told["zero_terminal_snr"] = zero_terminal_snr_of_scheduler(frozen.scheduler)
    if config.uses_own_samples:
        told["own_samples"] = {
            "count": config.own_samples, "sampler": config.own_sampler, "steps": config.own_steps
        }  # fmt: skip
    if config.objective != "distill":
        return told
    exact: dict[str, Any] = {"evaluations": 1}
    if config.guidance_range is not None:
        low, high = config.guidance_range
        exact = {
            "evaluations": 2,
            "guidance_scale": high if low == high else [low, high],
            "timesteps": [config.min_timestep, config.max_timestep],
        }
        if frozen.conditioning == "caption":
            exact["negative_prompt"] = config.negative_prompt
    cheap: dict[str, Any] = {"evaluations": 1}
    if config.has_student:
        cheap |= student_facts(frozen, config)
    return told | {
        "exact": exact, "cheap": cheap, "states": config.states, "weights": config.teacher_weighting
    }  # fmt: skip


def known_after(verdict: Verdict | None, strength: float | None) -> dict[str, Any]:
    """What is known of it after training: the share repaired, and the strength that was folded in.

    Args:
        verdict: on the final file; None without held-out images.
        strength: that --choose_strength found; None where it was not asked for.
    """
    found: dict[str, Any] = {}
    if isinstance(verdict, RepairVerdict):
        found["share_repaired"] = interval_json(verdict.share)
    if strength is not None:
        found["strength_folded_in"] = strength
    return found
