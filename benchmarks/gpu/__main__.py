"""Measures on a GPU what the tests on a CPU cannot see: `python -m benchmarks.gpu --out FOLDER`.

Runs the parts below in order of their value, prints figures as they come, and writes report.md and
report.json into the folder after each part. A part that fails is reported with the end of its
traceback, and the next one starts. No new part starts when the minutes are used up.

With `--device cpu --tiny` it runs anywhere on tiny models, to try the command itself.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.gpu import memory, numbers, speed
from benchmarks.gpu.report import Report
from benchmarks.gpu.subjects import Setup
from tests.tiny import FAMILIES

Measure = Callable[[Setup, Any, str, int, int], None]
MEASURED: list[tuple[str, Measure, tuple[str, int, int]]] = [
    # name, function, (base, side of the latent, batch)
    ("forward", speed.forward_pass, ("sd15", 64, 2)),
    ("forward", speed.forward_pass, ("dit-xl/2", 32, 8)),
    ("blocks compiled first", speed.attached_to_blocks, ("flux", 128, 1)),
    ("training", speed.training_step, ("sd15", 64, 4)),
    ("training", speed.training_step, ("dit-xl/2", 32, 16)),
    ("compiled", speed.compiled_model, ("dit-xl/2", 32, 8)),
    ("forward", speed.forward_pass, ("flux", 128, 1)),
    ("forward", speed.forward_pass, ("sdxl", 128, 2)),
    ("forward", speed.forward_pass, ("sd3", 128, 2)),
    ("offload", memory.group_offload, ("sd15", 64, 2)),
    ("offload", memory.group_offload, ("sd3", 128, 1)),
    ("casting", memory.layerwise_casting, ("sd15", 64, 2)),
    ("casting", memory.layerwise_casting, ("sd3", 128, 1)),
    ("blocks compiled", speed.compiled_blocks, ("flux", 64, 1)),
    ("forward, one at a time", speed.forward_pass, ("dit-xl/2", 32, 1)),
    ("forward, one at a time", speed.forward_pass, ("sd15", 64, 1)),
    ("compiled", speed.compiled_model, ("sd15", 64, 2)),
]


def parts_of(setup: Setup) -> list[tuple[str, Callable[[Any], Any]]]:
    """All parts by name, the most valuable first."""
    parts: list[tuple[str, Callable[[Any], Any]]] = []
    for name in FAMILIES:
        parts.append((f"numbers {name}", partial(_named, numbers.numbers, setup, name)))
    parts.append(("tests", partial(numbers.gpu_tests, setup)))
    for kind, function, which in MEASURED:
        parts.append((f"{kind} {which[0]}", partial(_measured, function, setup, which)))
    for name in FAMILIES:
        parts.append((f"graph {name}", partial(_named, numbers.cuda_graph, setup, name)))
    return parts


def _named(function: Callable[..., None], setup: Setup, name: str, part: Any) -> None:
    function(setup, part, name)


def _measured(function: Measure, setup: Setup, which: tuple[str, int, int], part: Any) -> None:
    function(setup, part, *which)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the report; 1 where a part failed or a figure is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no part after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--only", nargs="*", help="parts whose name begins so, e.g. forward")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none: use --device cpu --tiny to try this.")
    end = time.monotonic() + 60.0 * options.minutes
    setup = Setup(options.device, options.tiny, lambda: end - time.monotonic())
    report = Report(options.out, options.device)
    print(report.about, flush=True)
    for name, part in parts_of(setup):
        if options.only and not name.startswith(tuple(options.only)):
            continue
        if setup.left() <= 0 or report.lost:
            report.left_out.append(name)
            continue
        report.run(name, part)
        clean_up(setup, report)
    report.write()
    print(f"the report is in {options.out}")
    bad = any(p.failure or any(f.good is False for f in p.figures) for p in report.parts)
    return int(bad)


def clean_up(setup: Setup, report: Report) -> None:
    """Frees what a part left; notices when an error has made the GPU useless to this process."""
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
