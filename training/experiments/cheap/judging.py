"""A model beside the full one: pictures from the same noise, predictions on held-out images."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmp_common.patch.objectives import guided, squared_distance
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.data.draws import generator
from training.evaluation.metrics import within
from training.evaluation.random_features import random_features
from training.experiments.cheap.calls import CheapCall
from training.experiments.cheap.measures import USUAL, Measures, UseOfModel
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.pretraining import as_float
from training.experiments.miniature.subjects import Subject
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_losses, labelled_samples
from training.objective.noising import process_of
from training.objective.scaling import epsilon_scaled
from training.options.config import TrainConfig

PICTURES = 500  # of one model and one seed
BINS = 10
# A guided picture is compared with one of so many steps, which no cheaper way of drawing is nearer
# to by its own step size.
GUIDED_STEPS = 50
_FIRST_SEED = {"validation": 60_000, "test": 70_000}  # of the noise; no other study has these
_GAP_SEED, _HELD_OUT = 11, 512


@dataclass
class Judge:
    """Judges models of one subject on a split, with the noise and the labels of one seed.

    Args:
        subject: the base and its data.
        exact: its full model.
        call: whose exact call is the full model's.
        split: "validation" or "test".
        seed: decides noise and labels.
        kept: folder in which pictures of the full model stay.
    """

    subject: Subject
    exact: FrozenBase
    call: CheapCall
    split: SplitName
    seed: int
    kept: Path

    @torch.no_grad()
    def judge(self, model: FrozenBase, use: UseOfModel, added: int, stored: int) -> Measures:
        """All measures of a model, with whatever is on it.

        Args:
            added: bytes that it has more than the cheap call.
            stored: its bytes in all.
        """
        drawn = self.pictures(model, use)
        distances = squared_distance(drawn, self.target).double()
        own, full = self.subject.features(drawn), self.subject.features(self.target)
        share = (own - full).square().sum(1).mean() / full.var(0).sum()
        images = as_float(self.subject.split(self.split).images)
        real, network = self.subject.features(images), random_features()
        found = self.subject.classes(drawn) == self.labels
        return Measures(
            pixels=float(distances.mean()),
            pixels_error=float(distances.std()) / math.sqrt(len(distances)),
            features=float(share),
            frechet=frechet_distance(own, real),
            frechet_random=frechet_distance(_by_parts(network, drawn), _by_parts(network, images)),
            precision=float(within(own, real).double().mean()),
            recall=float(within(real, own).double().mean()),
            accuracy=float(found.double().mean()),
            gaps=tuple(self.gaps(model, use)),
            evaluations=use.evaluations,
            added_bytes=added,
            stored_bytes=stored,
        )

    @property
    def labels(self) -> Tensor:
        """(PICTURES,) drawn from the labels of the split."""
        labels = self.subject.split(self.split).labels
        source = generator("study of cheap calls", self.split, self.seed)
        return labels[torch.randint(len(labels), (PICTURES,), generator=source)]

    @cached_property
    def target(self) -> Tensor:
        """The pictures of the full model, from the file that keeps them if they were drawn."""
        guidance = self.call.guidance
        steps = GUIDED_STEPS if guidance != 1 else USUAL.steps
        path = self.kept / f"{self.split}-{self.seed}-guided-{guidance:g}.safetensors"
        if not path.is_file():
            use = UseOfModel(steps=steps, guidance=guidance)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{torch.initial_seed()}")
            save_file({"pictures": self.pictures(self.exact, use).contiguous()}, partial)
            partial.replace(path)
        return load_file(path)["pictures"]

    def pictures(self, model: FrozenBase, use: UseOfModel) -> Tensor:
        """(PICTURES, C, H, W) in [-1, 1]."""
        scaled = use.epsilon_scale != 1
        with epsilon_scaled(model, use.epsilon_scale) if scaled else nullcontext(model) as drawing:
            return labelled_samples(
                drawing, self.labels, seed=_FIRST_SEED[self.split] + self.seed,
                steps=use.steps, sampler=use.sampler, scale=use.guidance,
            )  # fmt: skip

    def gap(self, model: FrozenBase, use: UseOfModel) -> float:
        """The mean of `gaps`."""
        return sum(self.gaps(model, use)) / BINS

    @torch.no_grad()
    def loss(self, model: FrozenBase) -> float:
        """The squared error of the predicted noise on held-out images."""
        held_out = self.subject.split(self.split)
        images, labels = as_float(held_out.images)[:_HELD_OUT], held_out.labels[:_HELD_OUT]
        return float(labelled_losses(model, images, labels, draws=2, seed=self.seed).mean())

    @torch.no_grad()
    def gaps(self, model: FrozenBase, use: UseOfModel) -> list[float]:
        """The squared distance of a model's predictions to the exact ones, by tenth of timesteps.

        Of a model that is called twice (use.guidance) it is that of its guided predictions.
        """
        held_out = self.subject.split(self.split)
        images, labels = as_float(held_out.images)[:_HELD_OUT], held_out.labels[:_HELD_OUT]
        process = process_of(self.exact.scheduler, TrainConfig(base=self.exact.base.name))
        found = []
        for number in range(BINS):
            source = generator(_GAP_SEED, "gap", number, self.seed)
            noise = torch.randn(images.shape, generator=source)
            t = process.bin(number, BINS, torch.rand(len(images), generator=source))
            noisy = process.noisy(images, noise, t)
            target = _prediction(self.exact, noisy, t, labels, self.call.guidance)
            own = _prediction(model, noisy, t, labels, use.guidance)
            found.append(float((own - target).double().square().mean()))
        return found


def calibration(subject: Subject, exact: FrozenBase) -> list[tuple[Tensor, Tensor, Given]]:
    """Noised training images of all noise levels, for what is fitted without training."""
    data = subject.split("train")
    images, labels = as_float(data.images)[:_HELD_OUT], data.labels[:_HELD_OUT]
    process = process_of(exact.scheduler, TrainConfig(base=exact.base.name))
    source = generator(_GAP_SEED, "correction")
    noise = torch.randn(images.shape, generator=source)
    u, z = torch.rand(len(images), generator=source), torch.zeros(len(images))
    t = process.times(u, z, tuple(images.shape[-2:]))
    return [(process.noisy(images, noise, t), t, {"labels": labels})]


def _by_parts(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in images.split(_HELD_OUT)])


def _prediction(
    frozen: FrozenBase, noisy: Tensor, t: Tensor, labels: Tensor, scale: float
) -> Tensor:
    found = frozen.family.predict(frozen.model, noisy, t, {"labels": labels})
    if scale == 1:
        return found
    none = {"labels": torch.full_like(labels, int(frozen.null_label or 0))}
    return guided(found, frozen.family.predict(frozen.model, noisy, t, none), scale)
