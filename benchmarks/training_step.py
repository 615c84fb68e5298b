"""What training a patch costs: `python -m benchmarks.training_step --model dit-b/2`.

The floor is what no method that acts at the first site can avoid: the frozen model's forward pass
and the backward pass to the input of the base's first site. Prints the ratio to the floor of a step
of the trainer's own loop (noising, loss, check for NaN, clipping, AdamW, average; without data and
encoders), and of the bytes saved for backward, taken in turns in one process; with --decoder also
that of a patch at the decoder's sites alone, which needs no backward pass through the encoder; with
--variants also our recipes and prompt tuning; with --lora also a step of peft's LoRA r = 16
on the attention projections.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import diffusers
import torch
import torch.nn as nn
from accelerate import Accelerator

from benchmarks.models import dit, sd15
from benchmarks.timing import CLOCKS, interleaved, ratio
from dmp_common import Patch, attach, get_base
from dmp_common.bases.base import find_module
from training.command_line import resolve
from training.draws import draw
from training.families.table import family_of
from training.frozen import FrozenBase
from training.inputs import Inputs
from training.loop import losses_of, update
from training.methods import PatchMethod
from training.prepare import assemble
from training.process import process_of

RECIPES = ("stages", "clean")


def saved_bytes(run: Callable[[], Any], ignore: set[int]) -> int:
    """Bytes kept for the backward pass, weights left out."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignore:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(seen.values())


def forward_loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss with the cost of a mean squared error."""
    loss: torch.Tensor = model(**inputs, return_dict=False)[0].float().square().mean()
    return loss


class Step:
    """One kind of training step."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], optimizer: Any = None) -> None:
        self.model, self.inputs, self.optimizer = model, inputs, optimizer

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        return forward_loss(self.model, self.inputs)

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Floor(Step):
    """Frozen forward, backward to the input of the first site."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], site: nn.Module) -> None:
        super().__init__(model, inputs)
        self.site = site

    def loss(self) -> torch.Tensor:
        """The forward pass, with gradients from the site on."""

        def root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = "hidden_states"
            if args:
                return (args[0].detach().requires_grad_(), *args[1:]), kwargs
            return args, {**kwargs, name: kwargs[name].detach().requires_grad_()}

        handle = self.site.register_forward_pre_hook(root, with_kwargs=True)
        try:
            return super().loss()
        finally:
            handle.remove()


class TrainerStep:
    """A step of the trainer's loop; its patch is attached for this step only (a LoRA stays)."""

    def __init__(
        self, model: nn.Module, base: str, given: dict[str, Any], **options: object
    ) -> None:
        usual = {"dataset_name": "none", "cpu": True, "max_train_steps": 10**6}
        config = resolve({**usual, "base": base, **options})
        spec, nothing = get_base(base), cast("Any", None)  # neither encoders nor data
        frozen = FrozenBase(model, diffusers.DDPMScheduler(), spec, "diffusers", family_of(spec))
        process = process_of(frozen.scheduler, config)
        self.run = assemble(config, Accelerator(cpu=True), frozen, process, nothing, nothing)
        if isinstance(self.run.method, PatchMethod):
            self.run.method.remove()
        self.run.wrapped.train()
        clean = next(value for name, value in given.items() if name in ("sample", "hidden_states"))
        told = {"prompt": given.get("encoder_hidden_states"), "labels": given.get("class_labels")}
        names = [("benchmark", row) for row in range(len(clean))]
        self.inputs = Inputs(
            clean, draw(names, tuple(clean.shape[1:])), told, None, [str(n) for n in names]
        )

    @property
    def patch(self) -> Patch:
        """What is trained."""
        patch: Patch = self.run.method.patch
        return patch

    def loss(self) -> torch.Tensor:
        """The forward pass; in training the hooks are not needed any more for the backward."""
        patched = isinstance(self.run.method, PatchMethod)
        with attach(self.run.frozen.model, self.patch) if patched else nullcontext():
            return losses_of(self.run, self.inputs, 0)["loss"]

    def __call__(self) -> None:
        """Forward, backward, update, average."""
        run = self.run
        with run.accelerator.accumulate(run.wrapped):
            run.accelerator.backward(self.loss())
            update(run)
        run.average.update()


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sd15", "dit-b/2"], default="dit-b/2")
    parser.add_argument("--sites", default="all", help="all, or a named set such as encoder")
    parser.add_argument("--decoder", action="store_true", help="also a patch of the decoder alone")
    parser.add_argument("--variants", action="store_true", help="also ours and prompt tuning")
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--lora", action="store_true", help="also a step of peft's LoRA r = 16")
    options = parser.parse_args()
    size = options.latent, options.batch
    model, inputs = sd15(*size) if options.model == "sd15" else dit("b", options.batch)
    model = model.eval().requires_grad_(False)
    given = {**inputs(500.0), "timestep": torch.linspace(20.0, 980.0, options.batch)}
    first = find_module(model, get_base(options.model).sites[0].paths["diffusers"])
    assert first is not None
    floor = Floor(model, given, first)
    patched = TrainerStep(model, options.model, given, dmp_sites=options.sites)
    count = len(patched.patch.sites)
    print(f"{options.model}, {count} sites, batch {options.batch}, float32, CPU, "
          f"{torch.get_num_threads()} threads, {options.clock} clock, "
          f"torch {torch.__version__}")  # fmt: skip

    parameters = [*model.parameters(), *patched.patch.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    least, most = saved_bytes(floor.loss, weights), saved_bytes(patched.loss, weights)
    print(f"saved for backward, patch / floor: {most / least:.4f} ({least / 2**20:.0f} MiB)")
    now = CLOCKS[options.clock]
    steps: dict[str, Callable[[], None]] = {"floor": floor, "patch": patched}
    if options.decoder:
        steps["decoder"] = TrainerStep(model, options.model, given, dmp_sites="decoder")
    if options.variants:
        shared = {"dmp_sites": options.sites}
        for recipe in RECIPES:
            steps[recipe] = TrainerStep(model, options.model, given, recipe=recipe, **shared)
        steps["prompt"] = TrainerStep(model, options.model, given, method="prompt", **shared)
    seconds = interleaved(steps, options.rounds, now)
    for name in list(steps)[1:]:
        middle, spread = ratio(seconds, name, "floor")
        print(f"training step, {name} / floor: {middle:.4f} +- {spread:.4f}; "
              f"floor {statistics.median(seconds['floor']):.2f} s")  # fmt: skip
    if options.variants:
        for recipe in RECIPES:
            middle, spread = ratio(seconds, recipe, "prompt")
            print(f"training step, {recipe} / prompt: {middle:.4f} +- {spread:.4f}")
    if options.lora:
        lora = partial(TrainerStep, model, options.model, given, method="lora", network_dim=16)
        compare_with_lora(patched, lora, options.rounds, now)


def compare_with_lora(
    patched: TrainerStep,
    make_lora: Callable[[], TrainerStep],
    rounds: int,
    now: Callable[[], float],
) -> None:
    """In turns; LoRA is switched off for the patch's steps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora = make_lora()
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

    seconds = interleaved({"patch": run_patch, "lora": run_lora}, rounds, now)
    middle, spread = ratio(seconds, "patch", "lora")
    print(f"training step, patch / LoRA r=16: {middle:.4f} +- {spread:.4f} "
          f"({sum(p.numel() for p in adapter.values()):,} LoRA parameters)")  # fmt: skip


if __name__ == "__main__":
    main()
