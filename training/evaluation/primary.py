"""The primary comparisons of a report: few, named beforehand, and corrected for their number.

A report has dozens of intervals, each by itself; some exclude 0 by chance. What a report is about
is its first trained model beside every other row, in its first measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from training.evaluation.closeness import PIXELS
from training.evaluation.comparison import over_seeds, p_over_seeds
from training.evaluation.differences import Judged
from training.objective.intervals import Interval
from training.objective.multiple import holm

_MEASURES = (PIXELS, "fid", "loss")  # the first that there is


@dataclass(frozen=True)
class PrimaryComparison:
    """model - against, over trainings repeated with other seeds.

    Args:
        difference: with its 95 % interval.
        p: of Student's t test, or of Welch's where both sides are repeated.
        p_holm: adjusted by Holm for all primary comparisons of the report.
    """

    model: str
    against: str
    measure: str
    difference: Interval
    p: float
    p_holm: float

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        told = asdict(self)
        return {**told, "difference": self.difference._asdict()}


def primary_comparisons(judged: Mapping[str, Judged]) -> list[PrimaryComparison]:
    """The first trained model beside all other rows but the full model, which nothing is closer to.

    Returns:
        Nothing where that model was trained with one seed.
    """
    model = next((row for row in judged.values() if row.spec.trained), None)
    if model is None or len(model.results) < 2:
        return []
    known = ("loss", *model.metrics)
    measure = next(name for name in _MEASURES if name in known)
    own, found, p_values = model.seeds(measure), {}, {}
    for label, row in judged.items():
        if row is model or (measure == PIXELS and not any(row.seeds(PIXELS))):
            continue
        interval, p = over_seeds(own, row.seeds(measure)), p_over_seeds(own, row.seeds(measure))
        if interval is not None and p is not None:
            found[label], p_values[label] = interval, p
    adjusted = holm(p_values)
    return [
        PrimaryComparison(model.label, label, measure, found[label], p_values[label], corrected)
        for label, corrected in adjusted.items()
    ]
