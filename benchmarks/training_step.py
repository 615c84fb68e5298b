"""What training a patch costs: `python -m benchmarks.training_step --model dit-b/2`.

The floor is what no method that acts at the first site can avoid: the frozen model's forward pass
and the backward pass to the input of the base's first site. Prints the ratio to the floor of a step
of the trainer's own loop (noising, loss, check for NaN, clipping, AdamW, average; without data and
encoders), and of the bytes saved for backward, taken in turns in one process; with --decoder also
that of a patch at the decoder's sites alone, which needs no backward pass through the encoder; with
--variants also our recipes and prompt tuning; with --modulate also a patch that modulates; with
--lora also a step of peft's LoRA r = 16 on the attention projections; with --stored also a step
that reads exact predictions from files, as --cache_teacher does, beside the plain step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import torch.nn as nn
from accelerate import Accelerator

from benchmarks.floor import Floor, peak_bytes, saved_bytes
from benchmarks.models import build
from benchmarks.timing import CLOCKS, Clock, clock_of, interleaved, machine_of, ratio
from dmp_common import Patch, attach, get_base
from dmp_common.bases.base import find_module
from training.base.families.table import family_of
from training.base.frozen import FrozenBase
from training.data.summary import DataSummary
from training.methods.patch import PatchMethod
from training.objective.aim import Aim, noise_aim
from training.objective.inputs import Inputs
from training.objective.noise import draw
from training.objective.noising import process_of
from training.objective.store import AimStore
from training.objective.stored_aims import StoredData, StoredObjective
from training.options.command_line import resolve
from training.run.loop import step_losses, update
from training.run.parts import Parts, assemble

RECIPES = ("stages", "clean")
# The trainer's name for a precision of the frozen base.
PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}


class TrainerStep:
    """A step of the trainer's loop; its patch is attached for this step only (a LoRA stays)."""

    def __init__(
        self, model: nn.Module, base: str, given: dict[str, Any], **options: object
    ) -> None:
        weight = next(model.parameters())
        on_cpu, precision = weight.device.type == "cpu", PRECISIONS[weight.dtype]
        usual = {"recipe": "none", "dataset_name": "none", "cpu": on_cpu, "max_train_steps": 10**6}
        config = resolve({**usual, "base": base, "mixed_precision": precision, **options})
        spec, nothing = get_base(base), cast("Any", None)  # neither encoders nor data
        frozen = FrozenBase(model, diffusers.DDPMScheduler(), spec, "diffusers", family_of(spec))
        process = process_of(frozen.scheduler, config)
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
        self.run = assemble(Parts(config, accelerator, frozen, process, nothing), nothing)
        if isinstance(self.run.method, PatchMethod):
            self.run.method.remove()
        self.run.wrapped.train()
        clean = next(value for name, value in given.items() if name in ("sample", "hidden_states"))
        told = {"prompt": given.get("encoder_hidden_states"), "labels": given.get("class_labels")}
        known = {name: value for name, value in told.items() if value is not None}
        names = [("benchmark", row) for row in range(len(clean))]
        draws = draw(names, tuple(clean.shape[1:])).to(clean.device)
        self.inputs = Inputs(clean.float(), draws, known, None, [str(name) for name in names])

    @property
    def patch(self) -> Patch:
        """What is trained."""
        patch: Patch = self.run.method.patch
        return patch

    def loss(self) -> torch.Tensor:
        """The forward pass; in training the hooks are not needed any more for the backward."""
        patched = isinstance(self.run.method, PatchMethod)
        with attach(self.run.frozen.model, self.patch) if patched else nullcontext():
            return step_losses(self.run, self.aim(), 0)["loss"]

    def aim(self) -> Aim:
        """What the batch asks of the model."""
        return noise_aim(self.inputs, self.run.process)

    def __call__(self) -> None:
        """Forward, backward, update, average."""
        run = self.run
        with run.accelerator.accumulate(run.wrapped):
            run.accelerator.backward(self.loss())
            update(run)
        run.average.update()


class StoredStep(TrainerStep):
    """A step of --objective distill whose exact predictions are read from files each time.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path, *given: Any, **options: object) -> None:
        super().__init__(*given, **options)
        store = AimStore(folder, {})
        store.append(super().aim())
        store.commit((1,), complete=True)
        count = len(self.inputs.clean)
        data = StoredData([store], DataSummary("benchmark", count, count), seed=0)
        self.batches = data.batches(global_batch=count)

    def aim(self) -> Aim:
        """Reads the next batch."""
        return StoredObjective(self.run.device).aim(next(self.batches), [])


@dataclass(frozen=True)
class Compared:
    """What is compared, and on what.

    Args:
        base: name of the base.
        model, given: the frozen model and the arguments of a call.
        sites: all, or a named set.
        rounds: measurements of each step.
        clock: measures them.
    """

    base: str
    model: nn.Module
    given: dict[str, Any]
    sites: str
    rounds: int
    clock: Clock

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def step(self, **options: object) -> TrainerStep:
        """A step of the trainer."""
        return TrainerStep(self.model, self.base, self.given, **options)

    def stored_step(self, folder: Path, **options: object) -> TrainerStep:
        """A step whose exact predictions lie in a folder."""
        return StoredStep(folder, self.model, self.base, self.given, **options)


def compare(
    of: Compared,
    decoder: bool = False,
    variants: bool = False,
    lora: bool = False,
    modulate: bool = False,
    stored: Path | None = None,
) -> Iterator[tuple[str, float, str]]:
    """Compares a training step with the floor, and yields each figure as soon as it is known.

    Args:
        decoder, variants, lora: whether to compare these too, see the module's docstring.
        stored: a folder for exact predictions, to compare a step that reads them; None for no such
            step.

    Yields:
        What was measured, the figure, and its spread or unit.
    """
    first = find_module(of.model, get_base(of.base).sites[0].paths["diffusers"])
    assert first is not None
    patched = of.step(dmp_sites=of.sites)
    floor = Floor(of.model, of.given, first, patched.run.accelerator.autocast)
    yield "sites of the patch", len(patched.patch.sites), ""
    parameters = [*of.model.parameters(), *patched.patch.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    least, most = saved_bytes(floor.loss, weights), saved_bytes(patched.loss, weights)
    yield "saved for backward, patch / floor", most / least, f"floor {least / 2**20:.0f} MiB"
    steps: dict[str, Callable[[], None]] = {"floor": floor, "patch": patched}
    if decoder:
        steps["decoder"] = of.step(dmp_sites="decoder")
    if variants:
        for recipe in RECIPES:
            steps[recipe] = of.step(recipe=recipe, dmp_sites=of.sites)
        steps["prompt"] = of.step(method="prompt", dmp_sites=of.sites)
    if modulate:
        steps["modulate"] = of.step(mix="modulate")
    if stored is not None:
        steps["stored"] = of.stored_step(stored, dmp_sites=of.sites)
    seconds = interleaved(steps, of.rounds, of.clock)
    if stored is not None:
        middle, spread = ratio(seconds, "stored", "patch")
        yield "training step, stored predictions / plain", middle, f"+- {spread:.4f}"
    pairs = [(name, "floor") for name in list(steps)[1:]]
    pairs += [(recipe, "prompt") for recipe in RECIPES if variants]
    for over, under in pairs:
        middle, spread = ratio(seconds, over, under)
        slow = f"{under} {statistics.median(seconds[under]):.3f} s"
        yield f"training step, {over} / {under}", middle, f"+- {spread:.4f}; {slow}"
    if of.device.type == "cuda":
        peaks = {name: peak_bytes(run, of.device) for name, run in steps.items()}
        for name in list(steps)[1:]:
            text = f"floor {peaks['floor'] / 2**20:.0f} MiB"
            yield f"peak memory of a step, {name} / floor", peaks[name] / peaks["floor"], text
    if lora:
        yield from compare_with_lora(patched, of)


def compare_with_lora(patched: TrainerStep, of: Compared) -> Iterator[tuple[str, float, str]]:
    """Compares the patch's step with a LoRA's, which is switched off for the patch's steps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora = of.step(method="lora", network_dim=16)
    adapter = lora.run.method.trainable()
    layers = [m for m in lora.run.frozen.model.modules() if isinstance(m, BaseTunerLayer)]

    def switch(on: bool) -> None:
        for layer in layers:
            layer.enable_adapters(on)
        for parameter in adapter.values():
            parameter.requires_grad_(on)

    def run_patch() -> None:
        switch(False)
        patched()

    def run_lora() -> None:
        switch(True)
        lora()

    seconds = interleaved({"patch": run_patch, "lora": run_lora}, of.rounds, of.clock)
    middle, spread = ratio(seconds, "patch", "lora")
    count = sum(parameter.numel() for parameter in adapter.values())
    text = f"+- {spread:.4f}; {count:,} LoRA parameters"
    yield "training step, patch / LoRA r=16", middle, text
    if of.device.type == "cuda":
        peak = peak_bytes(run_patch, of.device) / peak_bytes(run_lora, of.device)
        yield "peak memory of a step, patch / LoRA r=16", peak, ""


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sd15", "dit-b/2", "dit-xl/2"], default="dit-b/2")
    parser.add_argument("--sites", default="all", help="all, or a named set such as encoder")
    parser.add_argument("--decoder", action="store_true", help="also a patch of the decoder alone")
    parser.add_argument("--variants", action="store_true", help="also ours and prompt tuning")
    parser.add_argument("--stored", action="store_true", help="also stored exact predictions")
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=[str(d)[6:] for d in PRECISIONS], default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--modulate", action="store_true", help="also a patch that modulates")
    parser.add_argument("--lora", action="store_true", help="also a step of peft's LoRA r = 16")
    options = parser.parse_args()
    of = compared(options.model, options.latent, options.batch, options.device,
                  getattr(torch, options.dtype), options.sites, options.rounds,
                  options.clock)  # fmt: skip
    print(f"{options.model}, batch {options.batch}, {options.dtype}, "
          f"{machine_of(options.device)}, {options.clock} clock, "
          f"torch {torch.__version__}")  # fmt: skip
    asked = (options.decoder, options.variants, options.lora, options.modulate)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stored = Path(folder) if options.stored else None
        for what, value, text in compare(of, *asked, stored):
            print(f"{what}: {value:.4f} {text}", flush=True)


def compared(
    base: str,
    latent: int,
    batch: int,
    device: str,
    dtype: torch.dtype,
    sites: str = "all",
    rounds: int = 10,
    clock: str = "wall",
) -> Compared:
    """A full-size model and the arguments of a call whose timesteps differ."""
    model, inputs = build(base, latent, batch, device, dtype)
    given = {**inputs(500.0), "timestep": torch.linspace(20.0, 980.0, batch, device=device)}
    return Compared(base, model, given, sites, rounds, clock_of(device, clock))


if __name__ == "__main__":
    main()
