r"""Compare what repairs a cheap call: patches, LoRA and controls without training.

    python -m training.experiments.cheap.cheap_study digits goals --out OUT --processes 2
    python -m training.experiments.cheap.cheap_study digits tune primary --out OUT
    python -m training.experiments.cheap.cheap_study cifar10-s tune primary --data DIR --out OUT
    python -m training.experiments.cheap.cheap_study digits explore --only methods bits --out OUT
    python -m training.experiments.cheap.cheap_tables OUT --write docs/results/cheap-calls.json

`tune` chooses the learning rate of each method on validation, with seed 0, by the gap of the
predictions that is left; the grid grows where its edge would be chosen. `primary` trains with five
other seeds and judges on the test split; `goals` does what the table of the goals needs, alone
with the rate at which tuning begins. `explore` does the rest with one seed, `steps` with other
lengths, `scale` with a factor of epsilon scaling that is chosen on validation. What is done is kept
in `--out`, and a study that was stopped goes on from there. comparisons.py says what is compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from dmp_common.patch.serialize import write_atomically
from training.experiments.cheap import comparisons as plan
from training.experiments.cheap.calls import CheapCall
from training.experiments.cheap.cheap_trial import CheapTrial
from training.experiments.cheap.comparisons import SIBLING, Model, Rates
from training.experiments.cheap.measures import CheapJob, Measures
from training.experiments.cheap.remedies import REMEDIES
from training.objective.grid_search import Choice, best_inside

_STAGES = ("tune", "goals", "primary", "explore", "steps", "scale", "sibling")
_LENGTHS = (50, 100, 200, 1000)  # of trainings, beside the usual one
_PRIMARY = ("repair", "lora", "modulation", "gated-small", "ungated-small")


def tuned(trial: CheapTrial, call: str, method: str, steps: int) -> Choice:
    """The gap left on validation at each rate that was tried; the best is never at an edge.

    Raises:
        ValueError: no grid of a reasonable size has the best rate inside.
    """
    torch.set_num_threads(1)

    def gap(rate: float) -> float:
        return trial.gap(CheapJob(trial.subject, call, method, rate, steps, 0, "validation"))

    return _inside(best_inside(gap, _around(REMEDIES[method].start, 0.3, 3)), method)


def scaled(trial: CheapTrial, model: Model, rates: Rates) -> Choice:
    """The Frechet distance on validation at each factor of epsilon scaling that was tried."""
    torch.set_num_threads(1)

    def distance(factor: float) -> float:
        use = replace(model.use, epsilon_scale=factor)
        job = plan.job(trial.subject, replace(model, use=use), rates, 0)
        return trial.done(replace(job, split="validation")).frechet

    return _inside(best_inside(distance, (0.995, 1.0, 1.005)), model.method)


def _around(start: float, *factors: float) -> list[float]:
    return [float(f"{start * factor:g}") for factor in (1, *factors)]


def _inside(found: Choice, what: str) -> Choice:
    if not found.inside:
        raise ValueError(f"expected a best value for {what} inside a grid, tried {found.tried}")
    return found


def tune_rates(trial: CheapTrial, wanted: Iterable[tuple[str, str]], options: StudyOptions) -> None:
    """Chooses the rates of some methods on some calls, and keeps them in a file."""
    path = trial.out / trial.subject / "rates.json"
    known = read_rates(path)
    left = [one for one in wanted if one not in known]
    with _pool(options.processes) as pool:
        waiting = {pool.submit(tuned, trial, *one, options.steps): one for one in left}
        for future in as_completed(waiting):
            call, method = waiting[future]
            known[call, method] = future.result().tried
            entries = [[*key, sorted(value.items())] for key, value in sorted(known.items())]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(entries, indent=1).encode())
            print(f"{call} {method}: gap left at each rate {known[call, method]}", flush=True)


def read_rates(path: Path) -> dict[tuple[str, str], dict[float, float]]:
    """What `tune` found: the gap left at each rate, by call and method."""
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {(call, method): dict(map(tuple, tried)) for call, method, tried in entries}


def chosen_rates(path: Path) -> dict[tuple[str, str], float]:
    """The best rate of each method on each call."""
    found = read_rates(path)
    return {key: min(tried, key=lambda rate: tried[rate]) for key, tried in found.items()}


def scaled_jobs(trial: CheapTrial, rates: Rates, processes: int) -> list[CheapJob]:
    """Jobs on test with epsilon scaling, each model with its best factor on validation."""
    with _pool(processes) as pool:
        found = list(pool.map(partial(scaled, trial, rates=rates), plan.SCALED))
    jobs = []
    for model, choice in zip(plan.SCALED, found, strict=True):
        print(f"{model.call} {model.method}: distance at each factor {choice.tried}", flush=True)
        use = replace(model.use, epsilon_scale=choice.best)
        jobs.append(plan.job(trial.subject, replace(model, use=use), rates, plan.SEEDS[0]))
    return jobs


def judge_all(trial: CheapTrial, jobs: Sequence[CheapJob], processes: int) -> None:
    """Does all jobs, several at once; an error ends the study, what is done stays."""
    with _pool(processes) as pool:
        waiting = {pool.submit(_done, trial, job): job for job in dict.fromkeys(jobs)}
        for number, future in enumerate(as_completed(waiting), 1):
            job, found = waiting[future], future.result()
            print(
                f"{number} of {len(waiting)}: {job.call} {job.method} seed {job.seed}: pixels "
                f"{found.pixels:.5f}, Frechet {found.frechet:.3f}, gap {found.gap:.6f}",
                flush=True,
            )


def _done(trial: CheapTrial, job: CheapJob) -> Measures:
    torch.set_num_threads(1)
    return trial.done(job)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return int(text)


class StudyOptions(argparse.Namespace):
    """The command line."""

    subject: str
    stages: list[str]
    data: Path | None
    out: Path
    steps: int
    processes: int
    only: list[str]
    methods: list[str]


def _wanted(options: StudyOptions) -> list[tuple[str, str]]:
    """What is tuned: the methods asked for on the calls of their kind."""
    if options.methods:
        return [(options.call, method) for method in options.methods]
    return [*((plan.BITS_3, method) for method in _PRIMARY), (plan.GUIDED, "repair")]


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=plan.SUBJECTS)
    parser.add_argument("stages", nargs="+", choices=_STAGES)
    parser.add_argument("--data", type=Path, help="folder that make_cifar filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=_count, default=plan.STEPS, help="of each in `tune`")
    parser.add_argument("--processes", type=_count, default=1)
    parser.add_argument("--methods", nargs="+", choices=REMEDIES, default=[], help="to tune")
    parser.add_argument("--call", default=plan.BITS_3, help="on which these methods are tuned")
    parser.add_argument(
        "--only", nargs="+", choices=plan.EXPLORED, default=list(plan.EXPLORED), help="to explore"
    )
    options = parser.parse_args(namespace=StudyOptions())
    trial = CheapTrial(options.subject, options.data, options.out)
    try:
        CheapCall(options.call)
        trial.open()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if "tune" in options.stages:
        tune_rates(trial, _wanted(options), options)
    rates = chosen_rates(options.out / options.subject / "rates.json")
    jobs = plan.primary(options.subject, rates) if "primary" in options.stages else []
    if "goals" in options.stages:
        jobs += plan.of_goals(options.subject, rates)
    if "explore" in options.stages:
        for name in options.only:
            jobs += plan.explored(options.subject, name, rates)
    if "steps" in options.stages:
        jobs += plan.trained_longer(options.subject, rates, _LENGTHS)
    if "scale" in options.stages:
        jobs += scaled_jobs(trial, rates, options.processes)
    judge_all(trial, jobs, options.processes)
    if "sibling" in options.stages:
        sibling = CheapTrial(f"{options.subject}{SIBLING}", options.data, options.out)
        sibling.open()  # fine-tunes it, once for all processes
        judge_all(sibling, plan.on_sibling(options.subject, rates), options.processes)


if __name__ == "__main__":
    main()
