"""The measures of the study by model: what its tables ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from training.experiments.cheap import comparisons as plan
from training.experiments.cheap.calls import CheapCall
from training.experiments.cheap.comparisons import Model
from training.experiments.cheap.measures import USUAL, Measures, Results, UseOfModel


class Findings:
    """The measures by model: what tables ask for."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def of(self, subject: str, model: Model, steps: int | None = None) -> dict[int, Measures]:
        """The measures of a model on the test split by seed; with `steps` of that training alone.

        Otherwise of the study's own number of steps.
        """
        lengths = (0, plan.STEPS if steps is None else steps)
        return {
            job.seed: measures
            for job, measures in sorted(self.results.items())
            if (job.subject, job.call, job.method, job.use, job.split)
            == (subject, model.call, model.method, model.use, "test")
            and job.steps in lengths
        }

    def values(self, subject: str, model: Model, measure: str) -> Tensor:
        """One measure of a model, a value for each seed (seeds,), float64."""
        found = [getattr(one, measure) for one in self.of(subject, model).values()]
        return torch.tensor(found, dtype=torch.float64)

    def left(self, subject: str, model: Model, measure: str = "pixels") -> Tensor:
        """What is left of the damage of the cheap call as it is, a share for each seed (seeds,).

        Distances are shares of the cheap call's; of a Frechet distance the full model's is taken
        off from both.
        """
        own, floor = self.values(subject, model, measure), self._floor(subject, model, measure)
        return (own - floor) / self.damage(subject, model, measure).mean()

    def damage(self, subject: str, model: Model, measure: str) -> Tensor:
        """What the cheap call does, for each seed of a model's (seeds,)."""
        plain = self.of(subject, Model(model.call, "none"))
        broken = [getattr(plain[seed], measure) for seed in self.of(subject, model)]
        return torch.tensor(broken, dtype=torch.float64) - self._floor(subject, model, measure)

    def _floor(self, subject: str, model: Model, measure: str) -> Tensor:
        """What the full model has in the place of damage (seeds,): nothing, or its own distance."""
        seeds = list(self.of(subject, model))
        if not measure.startswith("frechet"):
            return torch.zeros(len(seeds), dtype=torch.float64)
        exact = Model(model.call, "full model", _full_use(CheapCall(model.call).guidance))
        full = self.of(subject, exact)
        return torch.tensor([getattr(full[seed], measure) for seed in seeds], dtype=torch.float64)


def _full_use(guidance: float) -> UseOfModel:
    return USUAL if guidance == 1 else UseOfModel(guidance=guidance)
