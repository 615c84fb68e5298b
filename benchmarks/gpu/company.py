"""Patches beside peft's LoRA in forward passes, on exact and on quantised weights."""

from __future__ import annotations

import importlib.util
import statistics
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import diffusers
import torch

from benchmarks.floor import peak_bytes
from benchmarks.gpu.report import Part
from benchmarks.gpu.speed import PASSES
from benchmarks.gpu.subjects import Setup, digits, relative_error
from benchmarks.models import Inputs, build, random_patch
from benchmarks.overhead import caller
from benchmarks.timing import clock_of, interleaved, ratio
from dmp_common import attach, get_base
from training.base.families.table import family_of
from training.base.frozen import FrozenBase
from training.base.layers import copy_sharing
from training.base.quantizing import quantized
from training.methods.lora import LoraMethod
from training.options.command_line import resolve

# What the patches do, by name. The third changes vectors, where the second changes all tokens.
MIXES: dict[str, dict[str, Any]] = {
    "add": {},
    "modulate": {"mix": "modulate"},
    "modulation layers": {"mix": "modulate", "sites": "modulation"},
}
RANK = 16
# What a quantisation needs, by how its name begins.
PACKAGES = {"q": "gguf", "int": "torchao", "nf4": "bitsandbytes"}


def frozen_of(setup: Setup, base: str, latent: int, batch: int) -> tuple[FrozenBase, Inputs]:
    """A full-size model of random weights as the trainer has it, or the digits' in its place."""
    if setup.tiny:
        base, (model, inputs) = "digits", digits(setup, batch)
    else:
        model, inputs = build(base, latent, batch, setup.device, setup.dtype)
    spec = get_base(base)
    scheduler = diffusers.DDPMScheduler()
    return FrozenBase(model, scheduler, spec, "diffusers", family_of(spec)), inputs


def beside_lora(
    setup: Setup, part: Part, base: str, latent: int, batch: int, quantization: str = ""
) -> None:
    """Plain forward passes, and those with patches that add or modulate, and with a LoRA.

    Args:
        quantization: as --student_quantization names it; "" for exact weights. The patches act on
            the output of a quantised layer and leave its weights alone.
    """
    package = next((p for q, p in PACKAGES.items() if quantization.startswith(q)), None)
    if package is not None and importlib.util.find_spec(package) is None:
        part.add(f"package {package}", "not installed")
        return
    frozen, inputs = frozen_of(setup, base, latent, batch)
    if quantization:
        exact = caller(frozen.model, inputs)(500.0)
        frozen = replace(frozen, model=quantized(frozen, quantization, False))
    plain = caller(frozen.model, inputs)
    before = plain(500.0)
    if quantization:
        part.add(f"error of the weights in {quantization}", relative_error(before, exact))
    with_lora = caller(_with_lora(frozen), inputs)
    patches = {
        name: random_patch(frozen.base.name, **variant).to(setup.device)
        for name, variant in MIXES.items()
    }
    for mix, patch in patches.items():
        with attach(frozen.model, patch, strength=0.0):
            equal = torch.equal(plain(500.0), before)
        part.hold(f"strength 0 is the base bit for bit, {mix}", equal)
        with attach(frozen.model, patch):
            part.add(f"change by the patch, {mix}", relative_error(plain(500.0), before))
    part.hold("remove() gives the base bit for bit", torch.equal(plain(500.0), before))

    def passes(forward: Any) -> None:
        for _ in range(PASSES):
            forward(500.0)

    runs: dict[str, Any] = {"plain": lambda: passes(plain), "LoRA": lambda: passes(with_lora)}
    around: dict[str, Any] = {}
    for mix, patch in patches.items():
        runs[mix] = runs["plain"]
        around[mix] = lambda patch=patch: attach(frozen.model, patch)
    seconds = interleaved(runs, setup.rounds, clock_of(setup.device), around)
    slow = f"plain {1e3 * statistics.median(seconds['plain']) / PASSES:.2f} ms"
    for name in (*MIXES, "LoRA"):
        middle, spread = ratio(seconds, name, "plain")
        promised = None if name == "LoRA" else setup.promised(1.01 if quantization else 1.015)
        part.add(f"forward, {name} / plain", middle, f"+- {spread:.4f}; {slow}", most=promised)
    if setup.on_gpu:
        device = torch.device(setup.device)
        least = peak_bytes(lambda: plain(500.0), device)
        for name, run in runs.items():
            with around.get(name, nullcontext)():
                more = peak_bytes(run, device) - least
            part.add(f"more memory at the peak, {name}", more / 2**20, "MiB")


def _with_lora(frozen: FrozenBase) -> torch.nn.Module:
    """A second model of the same weights with a LoRA on it, whose values are not zero."""
    model = copy_sharing(frozen.model)
    options: dict[str, Any] = {"base": frozen.base.name, "method": "lora", "network_dim": RANK}
    config = resolve({**options, "recipe": "none", "dataset_name": "none"})
    lora = LoraMethod(replace(frozen, model=model), config)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    for value in lora.trainable().values():
        drawn = torch.randn(value.shape, generator=generator)
        # As a pipeline has it: in the model's precision, frozen.
        value.data = (0.01 * drawn).to(device, frozen.dtype)
        value.requires_grad_(False)
    return model.eval()
