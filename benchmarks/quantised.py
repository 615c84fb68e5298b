"""What patches and a LoRA cost on a model in few bits: `python -m benchmarks.quantised`.

The layers of the blocks are in a type of GGUF and computed by diffusers' own `GGUFLinear`, as its
loader leaves them; `--form none` leaves the model as it is. Prints the ratios to the plain model of
forward passes with the paper's patch, with a modulating patch of four grids, and with peft's LoRA
r = 16 on the attention projections, all in turns in one process, at a timestep whose weights are
remembered; the time inside our hooks, and inside the LoRA's layers without the layers that they
wrap, as shares of the rest of the pass, which are steadier on a busy machine; and the memory that a
pass takes at its peak.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks.floor import peak_bytes
from benchmarks.models import MODELS, build, random_patch
from benchmarks.overhead import Forward, caller, hook_shares
from benchmarks.timing import CLOCKS, Clock, clock_of, interleaved, machine_of, ratio
from dmp_common import attach
from training.base.layers import copy_sharing, linear_layers, replace_layer
from training.methods.lora import LORA_TARGETS

FORMS = ("q4_0", "q8_0", "none")
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "modulate": {"mix": "modulate"},
    "modulation": {"mix": "modulate", "sites": "modulation"},
}
KNOWN = 500.0  # the timestep that is measured


def use_gguf(model: nn.Module, form: str) -> None:
    """Puts diffusers' layers of a type of GGUF in the place of the linear layers of the blocks."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType[form.upper()]
    for path, layer in linear_layers(model).items():
        stored = torch.from_numpy(gguf.quants.quantize(layer.weight.float().cpu().numpy(), kind))
        weight = GGUFParameter(stored.to(layer.weight.device), quant_type=kind)
        made = GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=layer.weight.dtype, device="meta",
        )  # fmt: skip
        made.weight, made.bias = weight, layer.bias
        replace_layer(model, path, made)


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """A copy of a model on the same weights, with a LoRA of random values."""
    copied = copy_sharing(model)
    config = LoraConfig(r=rank, target_modules=list(LORA_TARGETS), init_lora_weights=False)
    inject_adapter_in_model(config, copied)
    return copied.eval().requires_grad_(False)


def lora_shares(model: nn.Module, forward: Forward, steps: int, clock: Clock) -> list[float]:
    """Time that a LoRA adds in its layers over the rest of the forward pass.

    Args:
        model: from `with_lora`.
        forward: calls it at a timestep.
        steps: passes.
        clock: for both.
    """
    inside = 0.0

    def count(sign: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal inside
            inside += sign * clock()

        return hook

    handles = []
    for layer in [part for part in model.modules() if isinstance(part, BaseTunerLayer)]:
        for module, sign in ((layer, -1), (layer.get_base_layer(), 1)):
            handles.append(module.register_forward_pre_hook(count(sign)))
            handles.append(module.register_forward_hook(count(-sign)))
    shares = []
    for step in range(steps):
        inside, start = 0.0, clock()
        forward(999.0 - step * 999.0 / steps)
        shares.append(inside / (clock() - start - inside))
    for handle in handles:
        handle.remove()
    return shares


def peak_of(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that a run takes beside what was taken before; None where nobody can say."""
    if device.type == "cuda":
        return peak_bytes(run, device)
    if sys.platform != "linux":
        return None
    run()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak until now
    before = _resident("VmRSS:")
    run()
    return _resident("VmHWM:") - before


def _resident(entry: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


def options_of_command_line() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="dit-b/2")
    parser.add_argument("--form", choices=FORMS, default="q4_0", help="of the blocks' layers")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (not for DiT)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--rounds", type=int, default=10, help="measurements for the ratios")
    parser.add_argument("--steps", type=int, default=10, help="passes for the time inside hooks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark of the command line."""
    options = options_of_command_line()
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    clock = clock_of(device, options.clock)
    model, inputs = build(options.model, options.latent, options.batch, device, dtype)
    if options.form != "none":
        use_gguf(model, options.form)
    print(f"{options.model} in {options.form}, batch {options.batch}, computed in {options.dtype}, "
          f"{machine_of(device)}, {options.clock} clock, torch {torch.__version__}")  # fmt: skip

    plain = caller(model, inputs)
    adapted = with_lora(model, options.rank)
    lora = caller(adapted, inputs)
    patches = {
        name: random_patch(options.model, **variant).to(device)
        for name, variant in VARIANTS.items()
    }
    forwards: dict[str, Forward] = {"plain": plain, "lora": lora, **dict.fromkeys(patches, plain)}
    runs = {name: lambda call=call: call(KNOWN) for name, call in forwards.items()}
    around = {name: lambda patch=patch: attach(model, patch) for name, patch in patches.items()}
    seconds = interleaved(runs, options.rounds, clock, around)
    print(f"plain: {statistics.median(seconds['plain']):.3f} s a pass")
    for name in ("lora", *patches):
        middle, spread = ratio(seconds, name, "plain")
        values = "" if name == "lora" else f", {patches[name].saved_parameters:,} values"
        print(f"{name} / plain: {middle:.4f} +- {spread:.4f}{values}")
    for name, patch in patches.items():
        shares = hook_shares(model, patch, plain, options.steps, clock, CLOCKS[options.clock])
        found = ", ".join(f"{kind} {statistics.median(s):.3%}" for kind, s in shares.items())
        print(f"time inside hooks, {name}: {found} of the plain pass")
    share = statistics.median(lora_shares(adapted, lora, options.steps, clock))
    print(f"time that the LoRA adds in its layers: {share:.3%} of the plain pass")
    for name, run in runs.items():
        with around[name]() if name in around else torch.no_grad():
            peak = peak_of(run, device)
        if peak is not None:
            print(f"peak memory of a pass, {name}: {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
