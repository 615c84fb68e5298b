"""The verdict of a run: is what was trained better than the base, on images it never saw?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.objective.intervals import Interval, paired_interval

_FEWEST = 2  # images for an interval
_EARLY = 0.6  # the best step lies early if it is before this share of the steps


@dataclass(frozen=True)
class Verdict:
    """What the trained model is worth beside its base, on equal images and noise.

    Args:
        images: number of held-out images.
        base, trained: their mean losses.
        change: of the loss, as a share of the base's, with its 95 % interval over images.
        by_level: the same in each range of timesteps, least noisy first.
        best_step, last_step: the step that validated best, and the last one; 0 for none.
        kept_step: the step whose values the final file holds.
        falling: whether the loss still fell at the last validation.
        chosen: whether that step was chosen on these images, so that the change flatters it.
    """

    images: int
    base: float
    trained: float
    change: Interval
    by_level: tuple[Interval, ...]
    best_step: int
    last_step: int
    kept_step: int
    falling: bool = False
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """As NAME.json and the file's header have it."""
        return {
            "images": self.images,
            "loss_of_base": self.base,
            "loss": self.trained,
            "change": interval_json(self.change),
            "change_by_noise_level": [interval_json(interval) for interval in self.by_level],
            "best_step": self.best_step,
            "kept_step": self.kept_step,
            "last_step": self.last_step,
            "step_was_chosen_on_these_images": self.chosen,
            "better_than_base": self.change.high < 0,
            "verdict": self.sentence,
            "next": self.advice,
        }

    @property
    def sentence(self) -> str:
        """Better, worse, or not to be told."""
        if self.change.high < 0:
            return "better than the base"
        if self.change.low > 0:
            return "worse than the base"
        return "not to be told from the base: the interval holds 0"

    @property
    def advice(self) -> list[str]:
        """What to try next, a sentence each."""
        return [*self._about_length(), *self._about_levels(), *self._about_certainty()]

    def _about_length(self) -> list[str]:
        if not self.best_step or self.best_step == self.last_step:
            if self.falling and self.change.high < 0:
                return ["The loss still fell at the end: train longer (--max_train_steps)."]
            return []
        if self.kept_step != self.best_step:
            return [
                f"Step {self.best_step} was better than the one that is kept: give --keep_best."
            ]
        if self.best_step < _EARLY * self.last_step:
            return [
                "The best step came early: fewer steps, a lower --learning_rate, or more images "
                "may do more."
            ]
        return []

    def _about_levels(self) -> list[str]:
        better = [n for n, level in enumerate(self.by_level) if level.high < 0]
        worse = [n for n, level in enumerate(self.by_level) if level.low > 0]
        if not (better and worse):
            return []
        bins = len(self.by_level)
        low, high = 1000 * better[0] // bins, 1000 * (better[-1] + 1) // bins
        return [
            f"It helps at timesteps {low} to {high} and harms at others: train and use it there "
            f"alone (--min_timestep {low} --max_timestep {high})."
        ]

    def _about_certainty(self) -> list[str]:
        if self.change.low > 0:
            return ["Lower --learning_rate, or train fewer steps with --keep_best."]
        if self.change.high >= 0:
            return [
                "More held-out images (--validation_split, --max_validation_images) or more noises "
                "(--validation_draws) make the interval narrower. A base that has converged on "
                "such images leaves little to learn."
            ]
        return ["Look at the pictures too: the loss is not all that eyes see."]

    def text(self) -> str:
        """A few lines for the terminal and the model card."""
        level = 1000 // len(self.by_level)
        lines = [
            f"verdict: {self.sentence}",
            f"  loss on {self.images} held-out images: {self.base:.5f} (base) -> "
            f"{self.trained:.5f}, change {percent(self.change)}",
            "  by noise level (timesteps, change):",
            *(
                f"    {level * n:>4}-{level * (n + 1) - 1:<4} {percent(interval)}"
                for n, interval in enumerate(self.by_level)
            ),
        ]
        return "\n".join([*lines, *self._about_steps(), *self._next_lines()])

    def _about_steps(self) -> list[str]:
        if not self.best_step:
            return []
        flattered = ", chosen on these images, which flatters it a little" if self.chosen else ""
        return [
            f"  best at step {self.best_step} of {self.last_step}; the file holds step "
            f"{self.kept_step}{flattered}"
        ]

    def _next_lines(self) -> list[str]:
        return [f"  next: {sentence}" for sentence in self.advice]


def judge(base: Tensor, trained: Tensor, **steps: Any) -> Verdict | None:
    """The verdict on losses (images, bins) of base and trained model; None for too few images.

    Args:
        steps: the arguments of `Verdict` about steps, by name.
    """
    compared = held_out_comparison(base, trained, relative_change)
    return None if compared is None else Verdict(**compared, **steps)


def held_out_comparison(
    base: Tensor, trained: Tensor, relative: Callable[[Tensor, Tensor], Interval]
) -> dict[str, Any] | None:
    """What losses (images, bins) of base and trained model say; None for too few images.

    Args:
        relative: the change of losses (images,) as a share of the base's.
    """
    if len(base) < _FEWEST:
        return None
    levels = range(base.shape[1])
    return {
        "images": len(base),
        "base": float(base.mean()),
        "trained": float(trained.mean()),
        "change": relative(base.mean(1), trained.mean(1)),
        "by_level": tuple(relative(base[:, level], trained[:, level]) for level in levels),
    }


def relative_change(base: Tensor, trained: Tensor) -> Interval:
    """The change as a share of the base's mean loss."""
    scale = float(base.mean().clamp(min=torch.finfo(torch.float64).tiny))
    return Interval(*(value / scale for value in paired_interval(base, trained)))


def percent(interval: Interval, digits: int = 3) -> str:
    """An interval in per cent."""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.{digits}f} % [{low:+.{digits}f}, {high:+.{digits}f}]"


def interval_json(interval: Interval) -> Mapping[str, float]:
    """An interval as JSON has it."""
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
