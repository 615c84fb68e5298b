"""The trainings of a study: their options, their files, and how several run at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dmp_common import get_base
from training.experiments.miniature import trial
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.contenders import CONTENDERS, Setting
from training.experiments.miniature.subjects import Subject, open_subject

LATE = 499.0  # the clean half


@dataclass(frozen=True)
class Job:
    """One training and its judgement.

    Args:
        name: folder of the trial.
        options: of the trainer.
        split: to judge on.
        strengths: of a patch, each judged.
        first: timestep at which a patch begins to act.
    """

    name: str
    options: Mapping[str, Any]
    split: SplitName
    strengths: tuple[float, ...] = (1.0,)
    first: float = trial.WHOLE


class MissingError(Exception):
    """A stage needs what another one has not made yet."""


@dataclass(frozen=True)
class Study:
    """Where it happens, and how much of it.

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

    def options(
        self, contender: str, setting: Setting, seed: int, **changes: Any
    ) -> dict[str, Any]:
        """The trainer's options for a contender, a setting and a seed."""
        own = dict(CONTENDERS[contender].options)
        # K = 4 grids of half the side: as many prompts as the others have.
        if contender in ("stages", "stages-half", "mixture", "prompt-coarse"):
            own["grid"] = (get_base(self.subject).grid or (0,))[0] // 2
        return {
            **own, **setting.options, "seed": seed,
            "max_train_steps": self.steps, "lr_warmup_steps": min(50, self.steps // 10), **changes,
        }  # fmt: skip

    def tuning(self, names: Iterable[str]) -> list[Job]:
        """Each contender with each of its settings."""
        return [
            Job(f"tune/{name}/{setting.name}", self.options(name, setting, 0), "validation")
            for name in names
            for setting in CONTENDERS[name].settings
        ]

    def best(self, name: str) -> Setting:
        """The setting with the lowest loss on validation, the usual mean over all timesteps.

        Raises:
            MissingError: it was not tuned.
        """
        missing = [
            setting.name
            for setting in CONTENDERS[name].settings
            if not self.path(f"tune/{name}/{setting.name}", "validation").is_file()
        ]
        if missing:
            raise MissingError(
                f"expected {name} tuned in {self.out / self.subject}, found no measures of "
                f"{', '.join(missing)}: run the stage tune first"
            )
        losses = {
            setting: self.measures(f"tune/{name}/{setting.name}", "validation").loss
            for setting in CONTENDERS[name].settings
        }
        return min(losses, key=lambda setting: (losses[setting], setting.rate))

    def confirmation(self, names: Iterable[str], seeds: Iterable[int]) -> list[Job]:
        """The best setting of each contender on fresh seeds."""
        return [
            Job(f"confirm/{name}/{seed}", self.options(name, self.best(name), seed), "test")
            for name in names
            for seed in seeds
        ]

    def measures(
        self, name: str, split: str, strength: float = 1.0, first: float = trial.WHOLE
    ) -> trial.TrialMeasures:
        """The measures of a job that is done."""
        return trial.TrialMeasures.load(self.path(name, split, strength, first))

    def path(
        self, name: str, split: str, strength: float = 1.0, first: float = trial.WHOLE
    ) -> Path:
        """The file of a job's measures."""
        suffix = "" if strength == 1.0 else f"-{strength:g}"
        late = "" if first == trial.WHOLE else f"-from{first:g}"
        return self.out / self.subject / name / f"{split}{suffix}{late}.safetensors"


def do(study: Study, job: Job) -> str:
    """Trains and judges; in a process of its own."""
    torch.set_num_threads(1)
    subject = study.open()
    folder = study.out / study.subject / job.name
    spec = None if job.name == "base" else trial.train_trial(subject, job.options, folder)
    # A patch has its own off switch; whatever else was trained on a part gets it here.
    first = min(job.first, job.options.get("max_timestep", 1000) - 1)
    for strength in job.strengths:
        path = study.path(job.name, job.split, strength, job.first)
        trial.measure_trial(subject, spec, job.split, path, strength=strength, first=first)
    return job.name


def do_all(study: Study, jobs: list[Job], processes: int) -> None:
    """All jobs, several at once; the first error ends the study, what is done stays."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(do, study, job) for job in jobs]
        for number, future in enumerate(waiting, 1):
            print(f"{number} of {len(jobs)}: {future.result()}", flush=True)
