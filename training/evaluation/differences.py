"""Which models are compared with which, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.evaluation.comparison import Difference, bootstrap_interval, over_seeds
from training.evaluation.metrics import METRICS, Measured
from training.evaluation.spec import How, Spec
from training.objective.grid_search import Choice
from training.objective.intervals import Interval, t_interval


@dataclass
class ModelResult:
    """The figures of one trained model, or of the base.

    Args:
        losses: (images, bins) float64.
        measured: metrics of its samples.
        drawn: FID, sFID and KID of samples drawn again, (draws,) each.
        samples: how many were generated.
        pictures: the first samples, (C, H, W) each.
        evaluations: how often the model was called for each sample.
        epsilon: the factor that its predicted noise was divided by.
        choice: of that factor, where it was tuned.
    """

    losses: Tensor
    measured: Measured = field(default_factory=Measured)
    drawn: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    pictures: list[Tensor] = field(default_factory=list)
    evaluations: float = 0.0
    epsilon: float = 1.0
    choice: Choice | None = None


@dataclass
class Judged:
    """The results of all seeds of one label.

    Args:
        spec: what the command line says of the first of them.
        how: the samples were drawn.
        results: one for each file.
    """

    spec: Spec
    how: How
    results: list[ModelResult] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in the report."""
        return self.spec.label

    @property
    def method(self) -> str:
        """The kind of the model."""
        return self.spec.kind

    @property
    def losses(self) -> Tensor:
        """(images, bins), the mean over seeds."""
        return torch.stack([result.losses for result in self.results]).mean(0)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics by name, means over seeds."""
        names = self.results[0].measured.values
        return {
            name: sum(result.measured.values[name] for result in self.results) / len(self.results)
            for name in names
        }

    def seeds(self, measure: str) -> list[float]:
        """The values of a measure, one for each seed."""
        if measure == "loss":
            return [float(result.losses.mean()) for result in self.results]
        return [result.measured.values[measure] for result in self.results]

    def drawn(self, measure: str) -> Tensor:
        """Values on samples drawn again, (draws,), the mean over seeds."""
        return torch.stack([result.drawn[measure] for result in self.results]).mean(0)

    def single(self, measure: str) -> Tensor:
        """Values of each sample, the mean over seeds."""
        return torch.stack([r.measured.single[measure].double() for r in self.results]).mean(0)


def differences(judged: Mapping[str, Judged], reference: str) -> list[Difference]:
    """Every trained model against every plain one, and every gated patch against every other
    trained model; of two gated patches the one named first against the other. Every plain row
    against the reference.

    Args:
        reference: the label of what the models are put on, as it is.
    """
    found: list[Difference] = []
    models = list(judged.values())
    for number, model in enumerate(models):
        for place, against in enumerate(models):
            if model.spec.trained and against.spec.trained:
                wanted = model.method == "dmp" and (against.method != "dmp" or place > number)
            elif model.spec.trained:
                wanted = True
            else:
                wanted = against.label == reference
            if wanted and place != number:
                found += _between(model, against)
    return found


def _between(model: Judged, against: Judged) -> list[Difference]:
    def said(measure: str, interval: Interval, n: int, over: str) -> Difference:
        return Difference(model.label, against.label, measure, *interval, n, over)

    by_image = model.losses - against.losses
    images = len(by_image)
    found = [said("loss", t_interval(by_image.mean(1)), images, "images")]
    found += [
        said(f"loss_bin_{number}", t_interval(of_bin), images, "images")
        for number, of_bin in enumerate(by_image.T)
    ]
    metrics, others = model.metrics, against.metrics
    for name in METRICS:
        if name not in metrics or name not in others:
            continue
        first, second = model.results[0], against.results[0]
        if name in first.drawn:
            drawn = model.drawn(name) - against.drawn(name)
            interval = bootstrap_interval(metrics[name] - others[name], drawn)
            found.append(said(name, interval, first.samples, "samples"))
        elif name in first.measured.single and name in second.measured.single:
            paired = model.single(name) - against.single(name)
            over = "images" if name == "recall" else "samples"  # of recall: reference images
            found.append(said(name, t_interval(paired), len(paired), over))
    for name in ("loss", *METRICS):
        if name == "loss" or (name in metrics and name in others):
            repeated = over_seeds(model.seeds(name), against.seeds(name))
            if repeated is not None:
                found.append(said(name, repeated, len(model.results), "seeds"))
    return found
