"""A patch in use: strength, part of the schedule, sampler, steps, guidance, a fine-tuned sibling.

    python -m training.experiments.miniature.use digits --patch patch.safetensors --full FOLDER
    python -m training.experiments.miniature.use cifar10-s --data DIR --patch patch.safetensors

Prints the Frechet distance to the test split of base and patched base, from equal noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dmp_common import Patch, Schedule, attach
from training.base.frozen import FrozenBase, load_frozen
from training.evaluation.models import Spec, load_compared
from training.experiments.miniature.pretraining import as_float
from training.experiments.miniature.study_jobs import LATE, Study
from training.experiments.miniature.subjects import Subject
from training.experiments.miniature.trial import WHOLE
from training.objective.frechet import frechet_distance
from training.objective.labelled import labelled_samples
from training.options.config import TrainConfig

SEEDS = (0, 1)


@dataclass(frozen=True)
class UseSetting:
    """One way to use a patch; everything that is not named is usual.

    Args:
        first, last: timesteps between which the patch acts, noisy end first.
        sibling: on the fine-tuned base.
    """

    strength: float = 1.0
    first: float = WHOLE
    last: float = 0.0
    sampler: str = "unipc"
    steps: int = 20
    guidance: float = 1.0
    sibling: bool = False

    @property
    def base_part(self) -> tuple[object, ...]:
        """What the base's pictures depend on."""
        return self.sampler, self.steps, self.guidance, self.sibling


SETTINGS: dict[str, list[tuple[str, UseSetting]]] = {
    "strength": [(f"{s:g}", UseSetting(strength=s)) for s in (0.5, 1.0, 1.5, 2.0, 3.0)],
    "part of the schedule": [
        ("noisy half", UseSetting(last=500.0)),
        ("clean half", UseSetting(first=LATE)),
        ("noisy half, strength 2", UseSetting(strength=2.0, last=500.0)),
    ],
    "sampler": [(name, UseSetting(sampler=name)) for name in ("ddim", "ddpm", "dpm++", "euler")],
    "steps": [(str(n), UseSetting(steps=n)) for n in (6, 10, 50)],
    "guidance": [(f"{g:g}", UseSetting(guidance=g)) for g in (1.5, 2.0, 4.0)],
    "sibling": [("fine-tuned base", UseSetting(sibling=True))],
}


class Use:
    """A base with its patch, and pictures drawn from them.

    Args:
        subject: the base.
        patch: its patch.
        full: folder of a fine-tuned sibling, or None.
        samples: pictures for one distance.
    """

    def __init__(self, subject: Subject, patch: Patch, full: Path | None, samples: int) -> None:
        self.subject, self.patch = subject, patch
        self.frozen = load_frozen(
            TrainConfig(base=subject.base, pretrained_model_name_or_path=str(subject.weights))
        )
        self.full = None if full is None else load_compared(Spec("sibling", "full", str(full)))
        self.labels = subject.labels("test")[:samples]
        self.real = subject.features(as_float(subject.split("test").images))
        self.of_base: dict[tuple[object, ...], list[float]] = {}

    @contextmanager
    def model(self, sibling: bool) -> Iterator[FrozenBase]:
        """The base, or its sibling."""
        context: AbstractContextManager[FrozenBase] = nullcontext(self.frozen)
        if sibling:
            if self.full is None:
                raise ValueError("expected --full for a fine-tuned sibling, found none")
            context = self.full.on(self.frozen)
        with context as frozen:
            yield frozen

    def distances(self, setting: UseSetting) -> tuple[list[float], list[float]]:
        """Frechet distances of base and patched base, one for each seed of the noise."""
        with self.model(setting.sibling) as frozen:
            if setting.base_part not in self.of_base:
                self.of_base[setting.base_part] = self._distances(frozen, setting)
            schedule = Schedule(first=setting.first, last=setting.last)
            with attach(frozen.model, self.patch, strength=setting.strength, schedule=schedule):
                return self.of_base[setting.base_part], self._distances(frozen, setting)

    def _distances(self, frozen: FrozenBase, setting: UseSetting) -> list[float]:
        found = []
        for seed in SEEDS:
            drawn = labelled_samples(
                frozen,
                self.labels,
                seed=seed,
                steps=setting.steps,
                scale=setting.guidance,
                sampler=setting.sampler,
            )
            found.append(frechet_distance(self.subject.features(drawn), self.real))
        return found


def table(use: Use) -> str:
    """All settings as Markdown: mean over the seeds of the noise."""
    lines = ["| | | base | patched | difference (each seed of the noise) |", "|---" * 5 + "|"]
    for group, settings in SETTINGS.items():
        for label, setting in settings:
            if setting.sibling and use.full is None:
                continue
            base, patched = use.distances(setting)
            each = ", ".join(f"{b - a:+.3f}" for a, b in zip(base, patched, strict=True))
            means = f"{sum(base) / len(base):.3f} | {sum(patched) / len(patched):.3f}"
            lines.append(f"| {group} | {label} | {means} | {each} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("digits", "cifar10", "cifar10-s"))
    parser.add_argument("--data", type=Path, help="folder that make_cifar filled")
    parser.add_argument("--patch", required=True)
    parser.add_argument("--full", type=Path, help="folder of --method full: a sibling")
    parser.add_argument("--samples", type=int, default=1000, help="for one distance")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        subject = Study(arguments.subject, arguments.data, Path(), 0).open()
        use = Use(subject, Patch.load(arguments.patch), arguments.full, arguments.samples)
        print("\n" + table(use))
    except (ValueError, OSError) as error:  # a PatchError is a ValueError
        parser.error(str(error))


if __name__ == "__main__":
    main()
