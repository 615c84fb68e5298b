"""The verdict of --objective distill: how much of the gap to the exact call is repaired."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from training.objective.intervals import Interval, ratio_interval
from training.objective.losses import SIDES
from training.run.verdict import Verdict, held_out_comparison, interval_json, percent


@dataclass(frozen=True)
class RepairVerdict(Verdict):
    """What is left of the gap between the cheap call and the exact one, on held-out images.

    The losses of `Verdict` are mean squared distances to the exact prediction: `base` that of the
    cheap call as it is, `trained` with what was trained. No samples are needed.

    Args:
        sides: the share repaired of the conditional and the unconditional prediction and of their
            difference, which guidance multiplies; empty where there is one side.
    """

    sides: dict[str, Interval] = field(default_factory=dict)

    @property
    def share(self) -> Interval:
        """The share of the gap that is repaired: 1 - ||S_p - F||^2 / ||S - F||^2."""
        return _share(self.change)

    def to_json(self) -> dict[str, Any]:
        """As NAME.json and the file's header have it."""
        told = super().to_json()
        told["gap"], told["gap_before"] = told.pop("loss"), told.pop("loss_of_base")
        return {
            **told,
            "share_repaired": interval_json(self.share),
            "share_repaired_by_noise_level": [
                interval_json(_share(level)) for level in self.by_level
            ],
            "share_repaired_by_side": {
                name: interval_json(one) for name, one in self.sides.items()
            },
        }

    @property
    def sentence(self) -> str:
        """Repaired, worse, or not to be told."""
        if self.change.high < 0:
            return f"{self.share.mean:.1%} of the gap to the exact call is repaired"
        if self.change.low > 0:
            return "the gap to the exact call has grown"
        return "not to be told from the cheap call as it is: the interval holds 0"

    def _about_certainty(self) -> list[str]:
        if self.change.high < 0:
            return ["Look at the pictures too, beside those of the exact model from equal noise."]
        return super()._about_certainty()[:1] if self.change.low > 0 else [
            "More held-out images (--validation_split, --max_validation_images) or more noises "
            "(--validation_draws) make the interval narrower."
        ]  # fmt: skip

    def text(self) -> str:
        """A few lines for the terminal and the model card."""
        level = 1000 // len(self.by_level)
        lines = [
            f"verdict: {self.sentence}",
            f"  squared distance to the exact prediction on {self.images} held-out images: "
            f"{self.base:.3g} -> {self.trained:.3g}, repaired {percent(self.share, 1)}",
            "  by noise level (timesteps, share repaired):",
            *(
                f"    {level * n:>4}-{level * (n + 1) - 1:<4} {percent(_share(one), 1)}"
                for n, one in enumerate(self.by_level)
            ),
            *(f"  {name}: {percent(one, 1)}" for name, one in self.sides.items()),
        ]
        return "\n".join([*lines, *self._about_steps(), *self._next_lines()])


def judge_repair(
    base: Tensor, trained: Tensor, sides: tuple[Tensor, Tensor] | None, **steps: Any
) -> RepairVerdict | None:
    """The verdict on squared gaps (images, bins) before and after training.

    Args:
        sides: gaps (3, images, bins) of the sides of guidance before and after; None without.
        steps: see `judge`.

    Returns:
        None for too few images.
    """
    compared = held_out_comparison(base, trained, ratio_interval)
    if compared is None:
        return None
    shares = {}
    if sides is not None:
        for name, before, after in zip(SIDES, *sides, strict=True):
            shares[name] = _share(ratio_interval(before.mean(1), after.mean(1)))
    return RepairVerdict(**compared, **steps, sides=shares)


def _share(change: Interval) -> Interval:
    """A change of the gap as the share that is repaired."""
    return Interval(-change.mean, -change.high, -change.low)
