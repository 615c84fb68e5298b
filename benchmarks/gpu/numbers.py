"""Whether a patch gives the right numbers on the device: every family in small."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup, relative_error, soft_patch
from benchmarks.models import placed
from dmp_common import attach
from tests.tiny import FAMILIES, Tiny

ROOT = Path(__file__).resolve().parents[2]
# Where the tests marked gpu are: to collect all tests takes longer than they do.
TESTS = (
    "tests/dmp_common/test_attach_copies.py",
    "tests/dmp_common/test_devices.py",
    "tests/training/base/test_memory.py",
    "tests/training/run/test_devices.py",
)
HALVES = (torch.bfloat16, torch.float16)
TIMESTEPS = (10.0, 900.0)


def gpu_tests(setup: Setup, part: Part) -> None:
    """Runs the tests that need a GPU; without one they skip themselves."""
    # Beside xdist, pytest-benchmark warns that it is idle, which here would be an error.
    alone = ["-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-q", *alone, "-m", "gpu", "-rfE", *TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]  # most of their time is the processor's
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    limit = max(30.0, min(240.0, setup.left()))
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    part.hold("tests marked gpu pass", done.returncode == 0, lines[-1])
    if done.returncode:
        raise RuntimeError("pytest failed:\n" + "\n".join(lines[-10:]))


def outputs(family: Tiny, model: nn.Module, setup: Setup, dtype: torch.dtype) -> Callable[[], Any]:
    """A call of a tiny model on the device: its output in float32."""
    given = family.inputs(torch.tensor(TIMESTEPS), (8, 8), dtype, 1)
    inputs = placed(given, setup.device, dtype)

    def run() -> Tensor:
        with torch.no_grad():
            return family.call(model, inputs).float()

    return run


def numbers(setup: Setup, part: Part, name: str) -> None:
    """Identity, precision, devices and streams, for one family."""
    family = FAMILIES[name]
    model = family.model().to(setup.device)
    patch = soft_patch(family).to(setup.device)
    run = outputs(family, model, setup, torch.float32)
    plain = run()
    part.hold("the plain model repeats bit for bit", torch.equal(run(), plain))
    with attach(model, patch, strength=0.0):
        part.hold("strength 0 is the base bit for bit", torch.equal(run(), plain))
    with attach(model, patch):
        patched = run()
        part.hold("hits are misses bit for bit", torch.equal(run(), patched))
    part.hold("remove() gives the base bit for bit", torch.equal(run(), plain))
    part.add("change by the patch", relative_error(patched, plain), "relative")

    reference = family.model()
    on_cpu = outputs(family, reference, Setup("cpu", True, setup.left), torch.float32)
    with attach(reference, soft_patch(family)):
        expected = on_cpu()
    part.add("device against CPU, float32", relative_error(patched.cpu(), expected), most=1e-4)
    with attach(model, soft_patch(family)):
        error = relative_error(run(), patched)
    part.add("patch on the CPU, model on the device", error, "against both on it", most=1e-5)
    for dtype in HALVES:
        precision(setup, part, family, dtype, plain, patched)
    if setup.on_gpu:
        second_stream(part, copy.deepcopy(patch), model, run, patched)
        waits(part, copy.deepcopy(patch), model, run)


def precision(
    setup: Setup, part: Part, family: Tiny, dtype: torch.dtype, plain: Tensor, patched: Tensor
) -> None:
    """The error of half precision with a patch, beside that without."""
    model = family.model(dtype=dtype).to(setup.device)
    run = outputs(family, model, setup, dtype)
    alone = relative_error(run(), plain)
    with attach(model, soft_patch(family).to(setup.device)):
        error = relative_error(run(), patched)
    # Rounding grows with the values that a patch changes; a mistake would be far larger.
    limit = 2.0 * alone + 1e-3
    part.add(f"error of {str(dtype)[6:]}, patched", error, f"unpatched {alone:.2g}", most=limit)


def second_stream(
    part: Part, patch: Any, model: nn.Module, run: Callable[[], Tensor], expected: Tensor
) -> None:
    """Fields made on one stream are used on another."""
    here, other = torch.cuda.current_stream(), torch.cuda.Stream()
    with attach(model, patch):
        first = run()
        other.wait_stream(here)
        with torch.cuda.stream(other):
            second = run()
        here.wait_stream(other)
    equal = torch.equal(first, expected) and torch.equal(second, expected)
    part.hold("a second stream gives the same bits", equal)


def synchronisations(run: Callable[[], Any]) -> int:
    """How often a run makes the processor wait for the GPU, which torch then warns of."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def waits(part: Part, patch: Any, model: nn.Module, run: Callable[[], Tensor]) -> None:
    """How often a call waits for the GPU; each time the GPU runs out of work."""
    plain = synchronisations(run)
    with attach(model, patch):
        miss, hit = synchronisations(run), synchronisations(run)
    note = f"a miss; a hit {hit - plain}, the plain model itself {plain}"
    part.add("waits for the GPU that a patch adds to a call", float(miss - plain), note)


def captured(run: Callable[[], Tensor]) -> Tensor:
    """The output of a CUDA graph that was captured from a call, at its second replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # lazy initialisation must not be captured
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    output.zero_()
    graph.replay()
    graph.replay()
    return output.clone()


def cuda_graph(setup: Setup, part: Part, name: str) -> None:
    """A captured CUDA graph of a patched model, where the plain model can be captured."""
    if not setup.on_gpu:
        part.add("CUDA graphs", "not on this device")
        return
    family = FAMILIES[name]
    model = family.model().to(setup.device)
    run = outputs(family, model, setup, torch.float32)
    try:
        plain = captured(run)
    except RuntimeError as error:
        part.add("the plain model can be captured", False, str(error).splitlines()[0])
        return
    part.add("captured plain model", relative_error(plain, run()), most=1e-5)
    with attach(model, soft_patch(family).to(setup.device)):
        expected = run()
        part.add("captured patched model", relative_error(captured(run), expected), most=1e-5)
