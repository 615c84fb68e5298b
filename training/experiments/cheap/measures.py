"""What was measured of one model beside the full one, and the files that keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmp_common.patch.serialize import write_atomically
from training.experiments.miniature.cifar import SplitName

_DIGITS = 6  # significant ones that a file keeps


@dataclass(frozen=True, order=True)
class UseOfModel:
    """How a model is used for its pictures.

    Args:
        strength: of a patch.
        epsilon_scale: the predicted noise is divided by it (Ning et al. 2024); 1 for nothing.
        sampler, steps: of the pictures.
        guidance: of two calls a step; 1 for one call.
    """

    strength: float = 1.0
    epsilon_scale: float = 1.0
    sampler: str = "unipc"
    steps: int = 20
    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        """Calls of the model for one picture."""
        return self.steps * (1 if self.guidance == 1 else 2)


USUAL = UseOfModel()


@dataclass(frozen=True, order=True)
class CheapJob:
    """One model to judge, and the training that makes it.

    Args:
        subject: name of the base.
        call: name of the cheap call.
        method: a remedy's or a control's name.
        rate, steps: of the training; 0 where nothing is trained.
        seed: of training, noise and labels.
        split: to judge on.
        use: how the pictures are drawn.
    """

    subject: str
    call: str
    method: str
    rate: float = 0.0
    steps: int = 0
    seed: int = 0
    split: SplitName = "test"
    use: UseOfModel = USUAL

    @property
    def folder(self) -> Path:
        """Where its training lies, below the folder of results."""
        name = self.method.replace(" ", "-")
        return Path(self.subject, self.call, name, f"{self.rate:g}-{self.steps}", str(self.seed))

    @property
    def file(self) -> Path:
        """Where its measures lie."""
        changed = {k: v for k, v in asdict(self.use).items() if v != getattr(USUAL, k)}
        parts = [self.split, *(f"{name}={value}" for name, value in changed.items())]
        return self.folder / ("-".join(parts) + ".json")


@dataclass(frozen=True)
class Measures:
    """What a model is worth; distances are to the full model from the same noise.

    Args:
        pixels: mean over pictures of the mean squared distance of their values.
        pixels_error: the standard error of this mean over pictures.
        features: the same of the classifier's features, as a share of the features' variance.
        frechet: distance to the split's images in the classifier's features.
        frechet_random: the same in those of a network with random weights, which chose nothing.
        precision, recall: of the pictures among the split's images (Kynkaanniemi et al. 2019).
        accuracy: share of pictures in which the classifier finds the class asked for.
        gaps: mean squared distance of the predictions on held-out images, by tenth of timesteps.
        evaluations: calls of the model for one picture.
        added_bytes: size of what was added to the cheap model, in half precision.
        stored_bytes: of the whole model: weights in few bits with their scales, all else and what
            was added in half precision.
    """

    pixels: float
    pixels_error: float
    features: float
    frechet: float
    frechet_random: float
    precision: float
    recall: float
    accuracy: float
    gaps: tuple[float, ...]
    evaluations: int
    added_bytes: int
    stored_bytes: int

    @property
    def gap(self) -> float:
        """The mean gap of the predictions."""
        return sum(self.gaps) / len(self.gaps)


Results = dict[CheapJob, Measures]


def write_results(found: Results, path: Path) -> None:
    """Writes measures as JSON, one line for each model."""
    lines = [json.dumps({"job": asdict(job), **_short(found[job])}) for job in sorted(found)]
    write_atomically(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def read_measures(path: Path) -> Results:
    """Reads a file of `write_results`.

    Raises:
        ValueError: it is not one.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise TypeError("another kind of JSON")
        return dict(_entry(entry) for entry in entries)
    except FileNotFoundError as error:
        raise ValueError(f"expected measures of the study in {path}, found nothing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected measures of the study in {path}, found {error}") from error


def collected(folders: Iterable[Path]) -> Results:
    """All measures below some folders of results.

    Raises:
        ValueError: there are none in a folder, or a file is not one of them.
    """
    found: Results = {}
    for folder in folders:
        paths = [
            path for path in sorted(folder.rglob("*.json"))
            if path.name.startswith(("test", "validation"))
        ]  # fmt: skip
        if not paths:
            raise ValueError(f"expected measures of cheap_study in {folder}, found none")
        for path in paths:
            found |= read_measures(path)
    return found


def _entry(entry: dict[str, Any]) -> tuple[CheapJob, Measures]:
    job = dict(entry.pop("job"))
    use = UseOfModel(**job.pop("use"))
    return CheapJob(**job, use=use), Measures(**{**entry, "gaps": tuple(entry["gaps"])})


def _short(measures: Measures) -> dict[str, Any]:
    """The measures with a few significant digits."""

    def short(value: Any) -> Any:
        return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value

    found = {name: short(value) for name, value in asdict(measures).items()}
    return {**found, "gaps": [short(gap) for gap in measures.gaps]}
