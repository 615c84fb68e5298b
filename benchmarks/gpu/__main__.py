"""Measures on a GPU what the tests on a CPU cannot see: `python -m benchmarks.gpu --out FOLDER`.

Two parts, each of at most seven minutes on one card: `--part 1` is what a patch computes and costs
(numbers of every family, the tests marked gpu, forward passes and training steps of full-size
models of random weights, compiled and quantised, beside LoRA); `--part 2` is what it is worth (a
small model is trained on CIFAR-10, and patches and LoRAs on it). Without `--part` both run.

Runs the stages below in order of their value, prints figures as they come, and writes report.md and
report.json into the folder after each stage. A stage that fails is reported with the end of its
traceback, and the next one starts. No stage starts for which too little time is left.

With `--smoke` it runs on a CPU in seconds, on tiny models, to try the command itself.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.stages import Stage, stages_of
from benchmarks.gpu.subjects import Setup

MINUTES = 7.0  # of one part


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the report; 1 where a stage failed or a figure is not as promised."""
    options = parsed(arguments)
    tiny = options.tiny or options.smoke
    end = time.monotonic() + 60.0 * options.minutes
    setup = Setup(
        options.device, tiny, lambda: end - time.monotonic(), options.data, options.base,
        options.steps,
    )  # fmt: skip
    report = Report(options.out, options.device)
    print(report.about, flush=True)
    for stage in stages_of(setup, options.out):
        if not chosen(stage, options):
            continue
        # A tiny model says nothing about how long a stage takes on a card.
        if setup.left() <= (0.0 if tiny else stage.seconds) or report.lost:
            report.left_out.append(stage.name)
            continue
        report.run(stage.name, stage.run, None if tiny else stage.seconds)
        clean_up(setup, report)
    report.write()
    print(f"the report is in {options.out}")
    bad = any(p.failure or any(f.good is False for f in p.figures) for p in report.parts)
    return int(bad)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--part", type=int, choices=[1, 2], help="this part alone")
    parser.add_argument(
        "--minutes", type=float,
        help="start no stage after these (default: 7 with --part, else 60)",
    )  # fmt: skip
    parser.add_argument("--device", default=None, help="(default: cuda; cpu with --smoke)")
    parser.add_argument("--data", type=Path, help="CIFAR-10 for part 2: a zip or class folders")
    parser.add_argument("--base", type=Path, help="a base for part 2 in the place of training one")
    parser.add_argument(
        "--steps", type=int, default=200, help="of each training of part 2 (default: 200)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command")
    parser.add_argument(
        "--smoke", action="store_true", help="a few stages on tiny models, on the CPU"
    )
    parser.add_argument("--only", nargs="*", help="stages whose name begins so, e.g. forward")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cpu" if options.smoke else "cuda"
    if options.minutes is None:
        options.minutes = 60.0 if options.part is None else MINUTES
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none: use --smoke to try this on a CPU.")
    return options


def chosen(stage: Stage, options: argparse.Namespace) -> bool:
    """Whether a stage was asked for."""
    if options.part not in (None, stage.part):
        return False
    if options.only:
        return stage.name.startswith(tuple(options.only))
    return stage.smoke or not options.smoke


def clean_up(setup: Setup, report: Report) -> None:
    """Frees what a stage left; notices when an error has made the GPU useless to this process."""
    torch._dynamo.reset()
    gc.collect()
    if not setup.on_gpu:
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        report.lost = str(error).splitlines()[0]
        print(f"the GPU is lost to this process: {report.lost}", flush=True)


if __name__ == "__main__":
    # In the reference of the comparisons float32 must mean float32.
    torch.backends.cudnn.allow_tf32 = False
    diffusers.utils.logging.set_verbosity_error()
    sys.exit(main())
