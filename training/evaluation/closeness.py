"""How close pictures are to the full model's from the same noise: the first measure of a repair.

A distribution's distance, such as FID, does not see which picture changed, and a model may come
below the full one in it by sharpening. A repair has done its work where each picture is the one
that the full model draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dmp_common.patch.objectives import squared_distance
from training.evaluation.differences import Judged
from training.objective.intervals import Interval, ratio_interval, t_interval

# Of the pictures themselves, and of their features; names of measures.
PIXELS, FEATURES = "distance_to_full", "feature_distance_to_full"
_SIDES = {"pixels": PIXELS, "features": FEATURES}


class Target:
    """The pictures of the full model, which are kept while they are drawn, and their features."""

    def __init__(self) -> None:
        self.complete = False
        self.features: Tensor | None = None
        self._batches: dict[int, Tensor] = {}

    def distances(self, first: int, pictures: Tensor) -> Tensor:
        """Mean squared distance of each picture to the full model's, (B,) float64.

        Until the target is complete the pictures are the full model's own, and are kept.

        Args:
            first: the number of the first picture; batches are the same for every model.
            pictures: (B, C, H, W) in [-1, 1], or videos (B, C, frames, H, W).
        """
        rounded = pictures.half()  # of both sides, so that equal pictures are 0 apart
        if not self.complete:
            self._batches[first] = rounded
        return squared_distance(rounded.float(), self._batches[first].float()).double()

    def feature_distances(self, features: Tensor) -> Tensor:
        """Squared distance of features (N, F) to those of the full model, (N,) float64, as a share
        of their variance: two pictures that have nothing in common are 2 apart on average."""
        if not self.complete:
            self.features = features.double()
        assert self.features is not None
        spread = self.features.var(0).mean().clamp(min=torch.finfo(torch.float32).tiny)
        return (features.double() - self.features).square().mean(1) / spread


@dataclass(frozen=True)
class Gone:
    """The share of a plain row's distance that is gone: 1 - mean after / mean before.

    Args:
        mean, low, high: with a 95 % interval over pictures, seeds as they are.
        of: label of the plain row, which is sampled alike.
        seeds: the same over trainings repeated; None where the model has one.
    """

    mean: float
    low: float
    high: float
    of: str
    seeds: Interval | None


@dataclass(frozen=True)
class Closeness:
    """The distance of one model's pictures to the full model's.

    Args:
        mean, low, high: with a 95 % interval over pictures.
        gone: None for plain rows, and where no plain row is sampled alike.
    """

    mean: float
    low: float
    high: float
    gone: Gone | None

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        told = asdict(self)
        if self.gone is not None and self.gone.seeds is not None:
            told["gone"]["seeds"] = self.gone.seeds._asdict()
        return told


def closeness(judged: Mapping[str, Judged]) -> dict[str, dict[str, Closeness]]:
    """By label, and by "pixels" and "features": how close each model but the full one is.

    Returns:
        Nothing for rows without such a measure.
    """
    found: dict[str, dict[str, Closeness]] = {}
    for label, row in judged.items():
        known = row.results[0].measured.single
        if not known.get(PIXELS, torch.zeros(1)).any():
            continue  # the full model itself, or nothing to be close to
        before = next((one for one in judged.values() if _is_plain_of(one, row)), None)
        found[label] = {
            side: _closeness(row, before, name) for side, name in _SIDES.items() if name in known
        }
    return found


def _is_plain_of(plain: Judged, row: Judged) -> bool:
    """Whether a row is what another began with: the same base, sampled alike."""
    same = plain.how == row.how and plain.spec.settings.quantization is None
    return same and plain.method == "base" and row.spec.trained


def _closeness(row: Judged, before: Judged | None, name: str) -> Closeness:
    values = row.single(name)
    gone = None
    if before is not None:
        plain = before.single(name)
        change = ratio_interval(plain, values)
        shares = torch.tensor([1 - value / float(plain.mean()) for value in row.seeds(name)])
        seeds = t_interval(shares) if len(shares) > 1 else None
        gone = Gone(-change.mean, -change.high, -change.low, before.label, seeds)
    return Closeness(*t_interval(values), gone)
