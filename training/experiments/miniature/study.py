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
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dmp_common import PatchError
from training.experiments.miniature import trial
from training.experiments.miniature.contenders import CONTENDERS, ablations
from training.experiments.miniature.plot import plot_confirmation
from training.experiments.miniature.study_jobs import LATE, Job, MissingError, Study, do_all
from training.experiments.miniature.study_tables import (
    bins_table,
    confirmation_table,
    difference_table,
    strength_table,
    tuning_table,
)

CONFIRMATION_SEEDS = (101, 102, 103, 104, 105)
STAGES = ("tune", "confirm", "plot", "late", "ablate", "strength")
PATCHES = ("dmp", "prompt")
# The contender that the others are compared with.
OURS = {"digits": "stages", "cifar10": "stages-half", "cifar10-s": "stages-half"}
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)


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
