"""What training a patch costs: `python -m benchmarks.training_step --model dit-b/2`.

The floor is what no method that acts at the first site can avoid: the frozen model's forward pass
and the backward pass to the first site's input. Prints the ratio of a patch's training step
(optimiser included) to the floor, and of the bytes saved for backward, taken in turns in one
process; and to a step of peft's LoRA r = 16 on the attention projections, where peft is installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from benchmarks.models import dit, sd15
from benchmarks.timing import CLOCKS, interleaved, ratio
from dmp_common import Patch, attach
from dmp_common.sites import find_module


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


class Patched(Step):
    """A patch, attached for this step only."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], patch: Patch) -> None:
        super().__init__(model, inputs, torch.optim.AdamW(patch.parameters(), lr=1e-4))
        self.patch = patch.train()

    def loss(self) -> torch.Tensor:
        """The forward pass; in training the hooks are not needed any more for the backward."""
        with attach(self.model, self.patch):
            return super().loss()


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["sd15", "dit-b/2"], default="dit-b/2")
    parser.add_argument("--sites", default=None, help="all, encoder, decoder, blocks")
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
    patch = Patch.create(options.model, **({"sites": options.sites} if options.sites else {}))
    patch.scale_for_learning()
    first = find_module(model, next(iter(patch.sites.values())).paths["diffusers"])
    assert first is not None
    print(f"{options.model}, {len(patch.sites)} sites, batch {options.batch}, float32, CPU, "
          f"{torch.get_num_threads()} threads, {options.clock} clock, "
          f"torch {torch.__version__}")  # fmt: skip

    floor, patched = Floor(model, given, first), Patched(model, given, patch)
    parameters = [*model.parameters(), *patch.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    least, most = saved_bytes(floor.loss, weights), saved_bytes(patched.loss, weights)
    print(f"saved for backward, patch / floor: {most / least:.4f} ({least / 2**20:.0f} MiB)")
    now = CLOCKS[options.clock]
    seconds = interleaved({"floor": floor, "patch": patched}, options.rounds, now)
    middle, spread = ratio(seconds, "patch", "floor")
    print(f"training step, patch / floor: {middle:.4f} +- {spread:.4f}; "
          f"floor {statistics.median(seconds['floor']):.2f} s")  # fmt: skip
    if options.lora:
        compare_with_lora(patched, options.rounds, now)


def compare_with_lora(patched: Patched, rounds: int, now: Callable[[], float]) -> None:
    """Blocks of both, because peft changes the model: LoRA is switched off for the patch's."""
    from peft import LoraConfig

    model: Any = patched.model
    model.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    lora = Step(model, patched.inputs, torch.optim.AdamW(adapter, lr=1e-4))

    def run_patch() -> None:
        model.disable_adapters()
        for parameter in adapter:
            parameter.requires_grad_(False)
        patched()

    def run_lora() -> None:
        model.enable_adapters()
        for parameter in adapter:
            parameter.requires_grad_(True)
        lora()

    seconds = interleaved({"patch": run_patch, "lora": run_lora}, rounds, now)
    middle, spread = ratio(seconds, "patch", "lora")
    print(f"training step, patch / LoRA r=16: {middle:.4f} +- {spread:.4f} "
          f"({sum(p.numel() for p in adapter):,} LoRA parameters)")  # fmt: skip


if __name__ == "__main__":
    main()
