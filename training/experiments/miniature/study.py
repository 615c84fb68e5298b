"""The tables in miniature: every method tuned alike on validation, judged on test.

    python -m training.experiments.miniature.study digits --out OUT tune confirm
    python -m training.experiments.miniature.study cifar10 --data DIR --out OUT tune confirm ablate

`tune` trains each method at each of its learning rates with each objective (one seed) and judges it
on validation; `confirm` trains the best of each on fresh seeds and judges it on test, which `plot`
draws; `late` judges those patches once more, acting below timestep 500 alone; `ablate` changes the
paper's choices one at a time. What is done is not done again: a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dmp_common import PatchError, get_base
from training.experiments.miniature import trial
from training.experiments.miniature.cifar import SplitName
from training.experiments.miniature.contenders import CONTENDERS, Setting, ablations
from training.experiments.miniature.plot import plot_confirmation
from training.experiments.miniature.study_tables import (
    bins_table,
    confirmation_table,
    difference_table,
    strength_table,
    tuning_table,
)
from training.experiments.miniature.subjects import Subject, cifar10, digits

CONFIRMATION_SEEDS = (101, 102, 103, 104, 105)
STAGES = ("tune", "confirm", "plot", "late", "ablate", "strength")
PATCHES = ("dmp", "prompt")
# The contender that the others are compared with.
OURS = {"digits": "stages", "cifar10": "stages-half", "cifar10-s": "stages-half"}
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
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
        if self.subject == "digits":
            return digits()
        if self.data is None:
            raise ValueError(f"expected --data for {self.subject}: the folder of make_cifar")
        return cifar10(self.subject, self.data)

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


def tune(study: Study, names: list[str], processes: int) -> str:
    """The first stage; returns its table."""
    base = Job("base", {}, "validation")
    do_all(study, [base, *study.tuning(names)], processes)
    found = {
        name: {
            setting.name: study.measures(f"tune/{name}/{setting.name}", "validation")
            for setting in CONTENDERS[name].settings
        }
        for name in names
    }
    chosen = {name: study.best(name).name for name in names}
    return tuning_table(study.measures("base", "validation"), found, chosen)


def confirm(study: Study, names: list[str], processes: int, first: float = trial.WHOLE) -> str:
    """The best settings on fresh seeds, test; of patches that act from timestep `first` on."""
    jobs = [replace(job, first=first) for job in study.confirmation(names, CONFIRMATION_SEEDS)]
    do_all(study, [Job("base", {}, "test"), *jobs], processes)
    base, found = _confirmed(study, names, first)
    return _tables(base, found, OURS[study.subject])


def plot(study: Study, names: list[str]) -> str:
    """What `confirm` found as a picture, confirm.png.

    Raises:
        MissingError: it was not run.
    """
    path = study.out / study.subject / "confirm.png"
    try:
        base, found = _confirmed(study, names)
    except FileNotFoundError as error:
        raise MissingError(
            f"expected the measures of {', '.join(names)} on test, found {error}: run the stage "
            "confirm first"
        ) from error
    plot_confirmation(base, found, path, f"{study.subject}, five seeds, test")
    return f"![Loss and Frechet distance]({path.name})"


def _confirmed(
    study: Study, names: list[str], first: float = trial.WHOLE
) -> tuple[trial.TrialMeasures, dict[str, list[trial.TrialMeasures]]]:
    """The base's measures, and those of each contender by seed."""
    return study.measures("base", "test"), {
        name: [
            study.measures(f"confirm/{name}/{seed}", "test", first=first)
            for seed in CONFIRMATION_SEEDS
        ]
        for name in names
    }


def _tables(
    base: trial.TrialMeasures, found: Mapping[str, list[trial.TrialMeasures]], ours: str
) -> str:
    tables = [confirmation_table(base, found)]
    if ours in found:
        tables.append(difference_table(base, found, ours))
    return "\n\n".join([*tables, bins_table(base, found)])


def ablate(study: Study, processes: int) -> str:
    """Table 4 in miniature, on validation, at the paper's method's own rate; two seeds."""
    seeds, setting = (0, 1), study.best("dmp-paper")
    jobs = [
        Job(
            f"ablate/{name}/{seed}",
            study.options("dmp-paper", setting, seed, **changes),
            "validation",
        )
        for name, changes in ablations().items()
        for seed in seeds
    ]
    do_all(study, jobs, processes)
    found = {
        name: [study.measures(f"ablate/{name}/{seed}", "validation") for seed in seeds]
        for name in ablations()
    }
    base = study.measures("base", "validation")
    return _tables(base, found, "linear")


def strengths(study: Study, names: list[str], processes: int) -> str:
    """Patches at other strengths than 1, first confirmation seed, test."""
    seed = CONFIRMATION_SEEDS[0]
    jobs = [replace(job, strengths=STRENGTHS) for job in study.confirmation(names, [seed])]
    do_all(study, jobs, processes)
    found = {
        f"{name} x {strength:g}": study.measures(f"confirm/{name}/{seed}", "test", strength)
        for name in names
        for strength in STRENGTHS
    }
    return strength_table(study.measures("base", "test"), found)


def main() -> None:
    """Run the stages that the command line names, and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("digits", "cifar10", "cifar10-s"))
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--data", type=Path, help="folder that make_cifar filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of each training (default 300)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    study = Study(arguments.subject, arguments.data, arguments.out, arguments.steps)
    try:
        study.open()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    patches = [name for name in arguments.only if CONTENDERS[name].options["method"] in PATCHES]
    doing: dict[str, Callable[[], str]] = {
        "tune": lambda: tune(study, arguments.only, arguments.processes),
        "confirm": lambda: confirm(study, arguments.only, arguments.processes),
        "plot": lambda: plot(study, arguments.only),
        "late": lambda: confirm(study, patches, arguments.processes, LATE),
        "ablate": lambda: ablate(study, arguments.processes),
        "strength": lambda: strengths(study, patches, arguments.processes),
    }
    for stage in arguments.stages:
        try:
            table = doing[stage]()
        except (MissingError, PatchError) as error:
            parser.error(str(error))
        path = study.out / study.subject / f"{stage}.md"
        path.write_text(table + "\n", encoding="utf-8")
        print(f"\n{stage} on {study.subject}\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
