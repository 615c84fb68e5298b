"""What a patch costs on the device: forward passes, compiled models, training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.floor import peak_bytes
from benchmarks.gpu.report import Part
from benchmarks.gpu.subjects import Setup, Subject, digits, relative_error, subject
from benchmarks.overhead import KINDS, caller, forward_seconds, hook_shares
from benchmarks.timing import clock_of, interleaved, ratio
from benchmarks.training_step import Compared, compare, compared
from dmp_common import Patch, Schedule, attach

PASSES = 4  # forward passes of a measurement, so that the GPU is kept busy


def forward_pass(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """Patched over plain forward passes, time in our hooks, memory of the fields."""
    one = subject(setup, base, latent, batch)
    model, inputs = one.make()
    patch = one.patch()
    forward, clock = caller(model, inputs), clock_of(setup.device)
    forward(1.0)
    with attach(model, patch):
        forward(1.0)
    shares = hook_shares(model, patch, forward, 4 * setup.rounds, clock, time.perf_counter)
    for kind in KINDS:
        middle = statistics.median(shares[kind])
        part.add(f"processor time in our hooks, {kind}", 100.0 * middle, "% of a forward pass")
    part.add("fields remembered", patch.cache.bytes / 2**20, f"MiB, {4 * setup.rounds} timesteps")
    seconds = forward_seconds(model, patch, forward, setup.rounds, clock, PASSES)
    plain = 1e3 * statistics.median(seconds["plain"]) / PASSES
    for kind in reversed(KINDS):
        middle, spread = ratio(seconds, kind, "plain")
        note = f"+- {spread:.4f}; plain {plain:.2f} ms"
        part.add(f"patched / plain forward, {kind}", middle, note, most=setup.promised(1.02))
    if setup.on_gpu:
        device = torch.device(setup.device)
        plainly = peak_bytes(lambda: forward(500.0), device)
        with attach(model, patch):
            more = peak_bytes(lambda: forward(500.0), device) - plainly
        part.add("more memory at the peak of a forward pass", more / 2**20, "MiB, a hit")


def graphs(run: Callable[[], Any]) -> int:
    """Number of graphs that torch.compile makes in a run."""
    from torch._dynamo.utils import counters

    counters.clear()
    run()
    return int(counters["stats"]["unique_graphs"])


def compiled_model(
    setup: Setup, part: Part, base: str, latent: int, batch: int, mix: str = "add"
) -> None:
    """`torch.compile` of the whole model, after the patch was attached."""
    one = subject(setup, base, latent, batch, mix)

    def compile_whole(model: nn.Module) -> Any:
        return torch.compile(model, dynamic=False, backend=setup.backend)

    compare_compiled(setup, part, one, compile_whole)


def compiled_blocks(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """`compile_repeated_blocks`, after the patch was attached."""
    one = subject(setup, base, latent, batch)

    def compile_blocks(model: nn.Module) -> Any:
        compiler: Any = model
        compiler.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=setup.backend)
        return model

    compare_compiled(setup, part, one, compile_blocks)


def compare_compiled(
    setup: Setup, part: Part, one: Subject, compiler: Callable[[nn.Module], Any]
) -> None:
    """Compares a compiled patched model with a compiled plain one: graphs, numbers, time."""
    torch._dynamo.reset()
    (model, inputs), (base, _), patch = one.make(), one.make(), one.patch()
    attachment = attach(model, patch)
    patched_eagerly, plain_eagerly = caller(model, inputs)(500.0), caller(base, inputs)(500.0)
    plain, patched = caller(compiler(base), inputs), caller(compiler(model), inputs)
    ours = graphs(lambda: patched(500.0))
    again = graphs(lambda: patched(400.0))
    torch._dynamo.reset()  # the plain model must not find the patched model's graphs
    theirs = graphs(lambda: plain(500.0))
    part.add("graphs, plain", float(theirs))
    part.hold("as many graphs as the plain model", ours == theirs, f"patched {ours}")
    part.hold("another timestep makes no graph", again == 0, f"{again} graphs")
    alone = relative_error(plain(500.0), plain_eagerly)
    error = relative_error(patched(500.0), patched_eagerly)
    part.add("compiled against eager, patched", error, f"plain {alone:.2g}", most=2 * alone + 1e-3)
    compiled_ratio(setup, part, {"plain": plain, "patched": patched})
    changed_settings(part, attachment, patched)


def compiled_ratio(
    setup: Setup, part: Part, calls: dict[str, Callable[[float], Tensor]], around: Any = None
) -> None:
    """The ratio of compiled patched to compiled plain forward passes."""

    def passes(forward: Callable[[float], Tensor]) -> None:
        for _ in range(PASSES):
            forward(500.0)

    runs = {name: lambda forward=forward: passes(forward) for name, forward in calls.items()}
    seconds = interleaved(runs, setup.rounds, clock_of(setup.device), around)
    middle, spread = ratio(seconds, "patched", "plain")
    plain = 1e3 * statistics.median(seconds["plain"]) / PASSES
    note = f"+- {spread:.4f}; plain {plain:.2f} ms"
    part.add("compiled, patched / plain", middle, note, most=setup.promised(1.01))


def changed_settings(part: Part, attachment: Any, patched: Callable[[float], Tensor]) -> None:
    """New values for strength and schedule act, and make no graph."""
    before = patched(500.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        attachment.strength = 0.5
        weaker = patched(500.0)
        attachment.schedule = Schedule(first=100.0)
        outside = patched(500.0)
    part.hold("a new strength acts without recompiling", not torch.equal(before, weaker))
    part.hold("a new schedule acts without recompiling", not torch.equal(weaker, outside))


def attached_to_blocks(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """A patch on a model whose blocks were compiled before it came."""
    one = subject(setup, base, latent, batch)
    torch._dynamo.reset()
    model, inputs = one.make()
    patch: Patch = one.patch()
    forward = caller(model, inputs)
    with attach(model, patch):
        expected = forward(500.0)
    plain_eagerly = forward(500.0)
    compiler: Any = model
    compiler.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=setup.backend)
    part.add("graphs, plain", float(graphs(lambda: forward(500.0))))
    alone = relative_error(forward(500.0), plain_eagerly)
    with attach(model, patch):
        new = graphs(lambda: forward(500.0))
        error = relative_error(forward(500.0), expected)
    part.hold("attaching makes no graph", new == 0, f"{new} graphs")
    part.add("compiled against eager, patched", error, f"plain {alone:.2g}", most=2 * alone + 1e-3)
    around = {"patched": lambda: attach(model, patch)}
    compiled_ratio(setup, part, {"plain": forward, "patched": forward}, around)


def training_step(setup: Setup, part: Part, base: str, latent: int, batch: int) -> None:
    """A step of the trainer against the floor and against LoRA, in time and memory."""
    if setup.tiny:
        model, inputs = digits(setup, batch)
        clock = clock_of(setup.device)
        of = Compared("digits", model, inputs(500.0), "all", setup.rounds, clock)
    else:
        sites = "encoder" if base.startswith("sd") else "all"
        of = compared(base, latent, batch, setup.device, setup.dtype, sites, setup.rounds)
    promised = {
        "training step, patch / floor": 1.03,
        "saved for backward, patch / floor": 1.05,
        "training step, patch / LoRA r=16": 0.97,
    }
    for what, value, note in compare(of, lora=True, modulate=True):
        part.add(what, value, note, setup.promised(promised.get(what)))
