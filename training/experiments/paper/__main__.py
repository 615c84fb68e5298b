"""The command line: `python -m training.experiments.paper table2 --data_root DATA --out OUT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.experiments.paper.cells import Table, choose, read_setup, read_table, table_names
from training.experiments.paper.experiment import Experiment, pairs
from training.options.problems import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a table, lists cells, or collects results; returns the exit code."""
    options = _parser().parse_args(arguments)
    from dmp_common import PatchError  # --help must not wait for torch

    try:
        if options.what == "list" or options.list:
            _list(table_names() if options.what == "list" else [options.what])
        elif options.what == "collect":
            _collect(options)
        else:
            _run(options)
    except (ConfigError, PatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.experiments.paper",
        description="The paper's experiments: trains and evaluates the cells of a table, and sets "
        "our values beside the paper's. training/experiments/paper/README.md is the guide.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what", choices=[*table_names(), "collect", "list"], help="a table or figure; or collect "
        "OUT, all results in one; or list, all cells",
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", type=Path, metavar="OUT", help="of collect")
    parser.add_argument("--data_root", type=Path, help="folder of data sets and bases")
    parser.add_argument("--out", type=Path, help="folder of results, one for all tables")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="this cell; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="print the cells, run nothing")
    parser.add_argument(
        "--dry_run", action="store_true", help="write configurations, print commands, run nothing"
    )
    parser.add_argument(
        "--launch", default="", metavar="WORDS",
        help='what starts the training script: "accelerate launch --num_processes 8"',
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="options of the trainer that overrule the cells'",
    )  # fmt: skip
    parser.add_argument(
        "--evaluate", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="options of training/evaluate.py, such as inception_weights=PATH",
    )  # fmt: skip
    return parser


def _list(names: list[str]) -> None:
    setup = read_setup()
    for name in names:
        table = read_table(name)
        print(f"{name}: {table.title}")
        for cell in table.cells:
            fid = "not found" if cell.fid is None else f"{cell.fid:.2f}"
            shown = f"{cell.method} {cell.step}" if cell.step else cell.method
            place = f"{cell.base} ({setup.bases[cell.base].dataset})"
            print(f"  {cell.id:32} {place:36} {shown:16} paper {fid}")


def _run(options: argparse.Namespace) -> None:
    if options.data_root is None or options.out is None:
        raise ConfigError(f"expected --data_root and --out for {options.what}, found not both")
    table = read_table(options.what)
    cells = choose(table, options.only)
    experiment = Experiment(
        data=options.data_root.resolve(),
        out=options.out.resolve(),
        training=pairs(options.set, "--set"),
        evaluation=pairs(options.evaluate, "--evaluate"),
        launch=options.launch,
    )
    for cell in cells:  # a mistake in the last is found before the first is trained
        if cell.method != "base":
            experiment.config(cell)
    from training.experiments.paper.figures import (
        copy_heatmaps,
        copy_samples,
        require_matplotlib,
    )
    from training.experiments.paper.runner import evaluate_cells, sample_cells, train_cells

    if table.drawn == "lines":
        require_matplotlib()
    train_cells(experiment, cells, dry=options.dry_run)
    if table.drawn == "samples":
        pictures = sample_cells(experiment, cells, dry=options.dry_run)
    elif table.drawn != "heatmaps":
        evaluate_cells(experiment, cells, dry=options.dry_run)
    if options.dry_run:
        return
    if table.drawn == "heatmaps":
        print("\n".join(map(str, copy_heatmaps(experiment, table, cells))))
    elif table.drawn == "samples":
        print("\n".join(map(str, copy_samples(experiment, table, pictures))))
    else:
        _write(experiment.out, [table] if table.drawn == "lines" else [])


def _collect(options: argparse.Namespace) -> None:
    out = options.folder or options.out
    if out is None or not out.is_dir():
        raise ConfigError(f"expected the folder of results, collect OUT, found {out}")
    tables = [read_table(name) for name in table_names()]
    lines = [table for table in tables if table.drawn == "lines"]
    _write(out.resolve(), lines)


def _write(out: Path, drawn: list[Table]) -> None:
    from training.experiments.paper.figures import draw_lines
    from training.experiments.paper.results import collect

    contents = collect(out)
    print(out / "paper.md")
    for table in drawn:
        print(draw_lines(table, contents["tables"][table.name]["cells"], out))


if __name__ == "__main__":
    raise SystemExit(main())
