"""One trial: a method trained on a base with the trainer itself, and what it is worth."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmp_common import Schedule, attach
from dmp_common.patch.serialize import write_atomically
from training.base.frozen import FrozenBase, load_frozen
from training.evaluation.models import PatchModel, Spec, load_compared
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.pretraining import as_float
from training.experiments.miniature.subjects import Subject
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_losses, labelled_samples
from training.options.config import TrainConfig
from training.run.trainer import run

BINS = 10
WHOLE = 999.0  # timestep at which a schedule begins
_LOSS_SEED, _SAMPLE_SEED = 7, 1234
_FRECHET = "frechet."  # before the sampler's name in a file


@dataclass(frozen=True)
class TrialMeasures:
    """The measures of a model on one split.

    Args:
        losses: of each held-out image in each bin of timesteps (images, BINS), least noisy first.
        frechet: Frechet distance of generated images to the split, by sampler.
    """

    losses: Tensor
    frechet: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Denoising loss over all timesteps."""
        return float(self.losses.mean())

    def relative(self, base: TrialMeasures) -> Tensor:
        """(images,): change of the loss as a share of the base's in the bin, mean over bins."""
        return ((self.losses - base.losses) / base.losses.mean(0)).mean(1)

    def save(self, path: Path) -> None:
        """Writes the measures to a file."""
        distances = {
            _FRECHET + name: torch.tensor(value, dtype=torch.float64)
            for name, value in self.frechet.items()
        }
        save_file({"losses": self.losses, **distances}, path)

    @staticmethod
    def load(path: Path) -> TrialMeasures:
        """Reads the measures from a file."""
        kept = load_file(path)
        losses = kept.pop("losses")
        return TrialMeasures(losses, {k.removeprefix(_FRECHET): float(v) for k, v in kept.items()})


def train_trial(subject: Subject, options: Mapping[str, Any], folder: Path) -> Spec:
    """Trains, unless that was done before.

    Args:
        options: of the trainer; those of the subject are added.
        folder: gets the file, and `trial.json`, which says that it is whole.

    Raises:
        ValueError: the folder holds a trial with other options.
    """
    told, done = dict(options), folder / "trial.json"
    config = TrainConfig(
        base=subject.base,
        pretrained_model_name_or_path=str(subject.weights),
        cpu=not torch.cuda.is_available(),
        output_dir=str(folder),
        output_name="trained",
        overwrite=True,  # what a killed trial left
        # The subject has held-out images of its own.
        **{"validation_split": 0.0, **subject.options, **told},
    )
    if done.is_file():
        before = json.loads(done.read_text(encoding="utf-8"))
        if before["options"] != told:
            raise ValueError(
                f"expected the trial {told} in {folder}, found {before['options']}: choose "
                "another folder"
            )
        path = folder / before["file"]
    else:
        path = run(config)
        assert path is not None  # no dry run
        text = json.dumps({"options": told, "file": path.name}, indent=1)
        write_atomically(done, text.encode())
    return Spec("trial", config.method, str(path))


def measure_trial(
    subject: Subject,
    spec: Spec | None,
    split: SplitName,
    path: Path,
    *,
    strength: float = 1.0,
    first: float = WHOLE,
) -> TrialMeasures:
    """Measures of a trained model, or of the base (None), read from `path` if they are there.

    Args:
        split: "validation" or "test".
        strength: of a patch.
        first: timestep at which a patch, or another method's change, begins to act.
    """
    if path.is_file():
        return TrialMeasures.load(path)
    frozen = load_frozen(
        TrainConfig(base=subject.base, pretrained_model_name_or_path=str(subject.weights))
    )
    compared = None if spec is None else load_compared(spec)
    if isinstance(compared, PatchModel):
        context: AbstractContextManager[object] = attach(
            frozen.model, compared.patch, strength=strength, schedule=Schedule(first=first)
        )
    else:
        context = nullcontext() if compared is None else compared.on(frozen)
    switched = first < WHOLE and not isinstance(compared, PatchModel)  # no host can do this
    plain = copy.deepcopy(frozen.model) if switched else None
    with context as used:
        judged = used if isinstance(used, FrozenBase) else frozen
        if plain is not None:
            judged = replace(judged, model=_Switched(plain, judged.model, first).eval())
        found = _measure(subject, judged, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return found


class _Switched(nn.Module):
    """The base above a timestep, another model from there on."""

    def __init__(self, base: nn.Module, other: nn.Module, first: float) -> None:
        super().__init__()
        self.base, self.other, self.first = base, other, first
        self.config, self.dtype = base.config, base.dtype

    def forward(self, x: Tensor, timestep: Tensor, **given: Any) -> Any:
        acts = timestep <= self.first
        if acts.any() != acts.all():
            raise ValueError(f"expected timesteps on one side of {self.first}, found {timestep}")
        return (self.other if acts.all() else self.base)(x, timestep=timestep, **given)


def _measure(subject: Subject, frozen: FrozenBase, split: SplitName) -> TrialMeasures:
    held_out = subject.split(split)
    images = as_float(held_out.images)
    stride = max(len(images) // (subject.loss_images or len(images)), 1)
    losses = labelled_losses(
        frozen, images[::stride], held_out.labels[::stride],
        bins=BINS, draws=subject.draws, seed=_LOSS_SEED,
    )  # fmt: skip
    real, distances = subject.features(images), {}
    for sampler, steps in subject.samplers.items():
        drawn = labelled_samples(
            frozen, subject.labels(split), seed=_SAMPLE_SEED, steps=steps, sampler=sampler
        )
        distances[sampler] = frechet_distance(subject.features(drawn), real)
    return TrialMeasures(losses, distances)
