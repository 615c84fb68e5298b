r"""Compare what repairs a cheap call: patches, LoRA and bias correction, on pictures and numbers.

    python -m training.experiments.cheap.cheap_study digits tune confirm --out DIR
    python -m training.experiments.cheap.cheap_study cifar10-s tune confirm \
        --data DIR --out DIR --only repair lora --calls rtn3

`tune` tries two learning rates for each remedy on validation, with seed 0, on the first of the
chosen cheap calls; `--rate` says one for all instead. `confirm` trains the best one with three
other seeds and judges it on the test split. What is done is kept in `--out`, and a study that was
stopped goes on from there.

Everything is measured against the full model: the distance of each picture to the full model's from
the same noise, the share of the gap of the predictions that is repaired, and the Frechet distance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from training.experiments.cheap.cheap_tables import rates_table, repair_table
from training.experiments.cheap.cheap_trial import Cheap, RepairMeasures, SplitName
from training.experiments.cheap.remedies import CALLS, REMEDIES

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Repair:
    """One training on a cheap call, or none, and its judgement.

    Args:
        call: --student_quantization.
        remedy: its name; "none" and "bias correction" are not trained.
        rate: learning rate.
        seed: of the training.
        split: to judge on.
    """

    call: str
    remedy: str
    rate: float
    seed: int
    split: SplitName


def done(cheap: Cheap, repair: Repair) -> RepairMeasures:
    """Trains and judges, in a process of its own, unless that was done before."""
    torch.set_num_threads(1)
    return cheap.found(repair.call, repair.remedy, repair.rate, repair.seed, repair.split)


def all_done(cheap: Cheap, repairs: list[Repair], processes: int) -> dict[Repair, RepairMeasures]:
    """All repairs, several at once; the first error ends the study, what is done stays."""
    found = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(done, cheap, repair) for repair in repairs]
        for number, (repair, future) in enumerate(zip(repairs, waiting, strict=True), 1):
            found[repair] = future.result()
            print(
                f"{number} of {len(repairs)}: {repair.call} {repair.remedy} {repair.rate:g} "
                f"seed {repair.seed}: gap repaired {found[repair].share:.3f}",
                flush=True,
            )
    return found


def best_rates(cheap: Cheap, call: str, names: Iterable[str], processes: int) -> dict[str, float]:
    """The rate of each remedy that repairs most of the gap on validation."""
    jobs = [
        Repair(call, name, rate, 0, "validation") for name in names for rate in REMEDIES[name].rates
    ]
    found = all_done(cheap, jobs, processes)
    print(rates_table({(job.remedy, job.rate): one.share for job, one in found.items()}))
    best: dict[str, tuple[float, float]] = {}
    for job, one in found.items():
        if job.remedy not in best or one.share > best[job.remedy][0]:
            best[job.remedy] = one.share, job.rate
    return {name: rate for name, (_, rate) in best.items()}


def tables_of(
    cheap: Cheap, calls: Iterable[str], rates: dict[str, float], processes: int
) -> list[str]:
    """A table of each cheap call on the test split."""
    tables = []
    for call in calls:
        jobs = [Repair(call, name, 0.0, 0, "test") for name in ("none", "bias correction")]
        jobs += [Repair(call, n, rates[n], seed, "test") for n in rates for seed in SEEDS]
        found = all_done(cheap, jobs, processes)
        of_remedy: dict[str, list[RepairMeasures]] = {}
        for job, one in found.items():
            of_remedy.setdefault(job.remedy, []).append(one)
        tables.append(repair_table(call, of_remedy))
        print(tables[-1], flush=True)
    return tables


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=("digits", "cifar10-s"))
    parser.add_argument("stages", nargs="+", choices=("tune", "confirm"))
    parser.add_argument("--data", type=Path, help="folder that make_cifar filled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=REMEDIES, default=list(REMEDIES))
    parser.add_argument("--rate", type=float, help="for all, instead of tuning")
    parser.add_argument("--calls", nargs="+", default=list(CALLS))
    options = parser.parse_args()
    cheap = Cheap(options.subject, options.data, options.out, options.steps)
    try:
        cheap.open()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rates = dict.fromkeys(options.only, options.rate)
    if options.rate is None:
        rates = best_rates(cheap, options.calls[0], options.only, options.processes)
    if "confirm" in options.stages:
        tables = tables_of(cheap, options.calls, rates, options.processes)
        (options.out / f"{options.subject}.md").write_text("\n\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
