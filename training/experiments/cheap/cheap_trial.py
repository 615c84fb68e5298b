"""One repair of a cheap call, and what it is worth beside the full model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmp_common.patch.objectives import guided, squared_distance
from training.base.cheap import cheap_base
from training.base.families.family import Given
from training.base.frozen import FrozenBase, load_frozen
from training.base.rounding import correct_biases
from training.data.draws import generator
from training.evaluation.models import load_compared
from training.experiments.cheap.remedies import REMEDIES, call_options, guidance_of
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.pretraining import as_float
from training.experiments.miniature.subjects import Subject, open_subject
from training.experiments.miniature.trial import train_trial
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_samples
from training.objective.noising import process_of
from training.options.config import TrainConfig

__all__ = ["Cheap", "RepairMeasures", "SplitName"]

PICTURES, STEPS, SAMPLER = 1000, 20, "unipc"
BINS = 10
_SAMPLE_SEED, _GAP_SEED, _CORRECTED = 1234, 11, 512


@dataclass(frozen=True)
class RepairMeasures:
    """What a call is worth beside the full model.

    Args:
        pictures: mean squared distance of each picture to the full model's (PICTURES,).
        gaps: squared distance of the predictions on held-out images, before and after (2, BINS).
        frechet: Frechet distance to the split, of the full model and of this call (2,).
        before: `pictures` of the cheap call as it is (PICTURES,).
        frechet_before: Frechet distance of the cheap call as it is (1,).
    """

    pictures: Tensor
    gaps: Tensor
    frechet: Tensor
    before: Tensor
    frechet_before: Tensor

    @property
    def share(self) -> float:
        """The share of the gap of the predictions that is repaired."""
        return float(1 - self.gaps[1].sum() / self.gaps[0].sum())

    @property
    def repaired(self) -> Tensor:
        """The share of the picture distance that is gone, scalar: 1 - mean after / mean before."""
        return 1 - self.pictures.mean() / self.before.mean()


@dataclass(frozen=True)
class Cheap:
    """A base, and cheap calls of it.

    Args:
        subject: name of the base.
        data: folder that `make_cifar` filled; not for digits.
        out: folder of results.
        steps: of each training.
    """

    subject: str
    data: Path | None
    out: Path
    steps: int

    def open(self) -> Subject:
        """The subject that the study is about."""
        return open_subject(self.subject, self.data)

    def found(
        self, call: str, remedy: str, rate: float, seed: int, split: SplitName
    ) -> RepairMeasures:
        """Trains a remedy, unless that was done before, and judges it on a split."""
        folder = self.out / self.subject / call / remedy.replace(" ", "-") / f"{rate:g}" / str(seed)
        path = folder / f"{split}.safetensors"
        if path.is_file():
            return RepairMeasures(**load_file(path))
        subject = self.open()
        exact, cheap = self.models(subject, call)
        context: AbstractContextManager[object] = nullcontext()
        if remedy == "bias correction" and guidance_of(call) == 1:
            correct_biases(cheap, exact, _batches(subject, exact))
        elif remedy in REMEDIES:
            options = REMEDIES[remedy].all_options(call, rate, seed, self.steps)
            context = load_compared(train_trial(subject, options, folder)).on(cheap)
        bare = self.models(subject, call)[1]
        with context as used:
            judged = used if isinstance(used, FrozenBase) else cheap
            models = exact, bare, judged
            found = _judged(subject, models, call, split, self._reference(call, split))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in vars(found).items()}, path)
        return found

    def models(self, subject: Subject, call: str) -> tuple[FrozenBase, FrozenBase]:
        """The base as it is, and a second one for the cheap call, which patches may be put on."""
        options: dict[str, Any] = {"base": subject.base, **call_options(call)}
        config = TrainConfig(pretrained_model_name_or_path=str(subject.weights), **options)
        exact = load_frozen(config)
        if not config.has_student:
            return exact, replace(exact, model=copy.deepcopy(exact.model))
        return exact, cheap_base(exact, config)

    def _reference(self, call: str, split: SplitName) -> Path:
        """The file of pictures of the full model and the cheap call, which all remedies share."""
        return self.out / self.subject / call / f"{split}-pictures.safetensors"


def _judged(
    subject: Subject,
    models: tuple[FrozenBase, FrozenBase, FrozenBase],
    call: str,
    split: SplitName,
    reference: Path,
) -> RepairMeasures:
    """Pictures and predictions of the exact call, the cheap one, and the repaired one."""
    exact, bare, judged = models
    scale = guidance_of(call)
    images = as_float(subject.split(split).images)
    if reference.is_file():
        drawn = load_file(reference)
    else:
        full, cheap = _pictures(subject, exact, split, scale), _pictures(subject, bare, split)
        drawn = {"full": full, "cheap": cheap}
        reference.parent.mkdir(parents=True, exist_ok=True)
        save_file(drawn, reference)
    own = _pictures(subject, judged, split)
    real = subject.features(images)
    distances = {
        name: frechet_distance(subject.features(pictures), real)
        for name, pictures in {**drawn, "own": own}.items()
    }
    gaps = torch.stack(_gaps(subject, exact, (bare, judged), split, scale))
    return RepairMeasures(
        pictures=squared_distance(own, drawn["full"]).double(),
        gaps=gaps,
        frechet=torch.tensor([distances["full"], distances["own"]], dtype=torch.float64),
        before=squared_distance(drawn["cheap"], drawn["full"]).double(),
        frechet_before=torch.tensor([distances["cheap"]], dtype=torch.float64),
    )


def _pictures(subject: Subject, frozen: FrozenBase, split: SplitName, scale: float = 1.0) -> Tensor:
    labels = subject.labels(split)[:PICTURES]
    return labelled_samples(
        frozen, labels, seed=_SAMPLE_SEED, steps=STEPS, sampler=SAMPLER, scale=scale
    ).contiguous()  # fmt: skip


def _gaps(
    subject: Subject,
    exact: FrozenBase,
    calls: tuple[FrozenBase, ...],
    split: SplitName,
    scale: float,
) -> list[Tensor]:
    """For each call the squared distance of its predictions to the exact ones (BINS,)."""
    held_out = subject.split(split)
    images, labels = as_float(held_out.images)[:_CORRECTED], held_out.labels[:_CORRECTED]
    process = process_of(exact.scheduler, TrainConfig(base=exact.base.name))
    sums = [torch.zeros(BINS, dtype=torch.float64) for _ in calls]
    for number in range(BINS):
        source = generator(_GAP_SEED, "gap", number)
        noise = torch.randn(images.shape, generator=source)
        t = process.bin(number, BINS, torch.rand(len(images), generator=source))
        noisy, given = process.noisy(images, noise, t), {"labels": labels}
        with torch.no_grad():
            target = exact.family.predict(exact.model, noisy, t, given)
            if scale != 1:
                none = {"labels": torch.full_like(labels, int(exact.null_label or 0))}
                plain = exact.family.predict(exact.model, noisy, t, none)
                target = guided(target, plain, scale)
            for call, total in zip(calls, sums, strict=True):
                error = call.family.predict(call.model, noisy, t, given) - target
                total[number] = float(error.double().square().mean())
    return sums


def _batches(subject: Subject, exact: FrozenBase) -> Iterator[tuple[Tensor, Tensor, Given]]:
    """Noised training images for bias correction, of all noise levels."""
    data = subject.split("train")
    images, labels = as_float(data.images)[:_CORRECTED], data.labels[:_CORRECTED]
    process = process_of(exact.scheduler, TrainConfig(base=exact.base.name))
    source = generator(_GAP_SEED, "correction")
    noise = torch.randn(images.shape, generator=source)
    u, z = torch.rand(len(images), generator=source), torch.zeros(len(images))
    t = process.times(u, z, tuple(images.shape[-2:]))
    yield process.noisy(images, noise, t), t, {"labels": labels}
