"""The dry run: what a configuration means, and one step of it."""

from __future__ import annotations

import time
from itertools import islice

import torch.nn as nn

from training.base.memory import Held, weight_bytes
from training.options.command_line import as_toml
from training.run.filling import Filling
from training.run.loop import step_losses
from training.run.parts import Run
from training.run.scale import peak_memory


def dry_run(run: Run) -> None:
    """Prints configuration, data, sizes and memory, and does one step; nothing is saved."""
    config, accelerator = run.config, run.accelerator
    start = time.perf_counter()
    held, loss, on_disk = _one_step(run)
    seconds = time.perf_counter() - start
    if accelerator.is_main_process:
        print("\n".join([as_toml(config), *_about(run), *on_disk, *_memory(run, held)]))
        print(
            f"one step: {seconds:.2f} s (the first is slower), loss {loss:.4f}, peak "
            f"{_gib(peak_memory(run.device))} of this process"
        )
        print("dry run: nothing was saved")
    run.method.remove()


def _one_step(run: Run) -> tuple[int, float, list[str]]:
    """Does one optimiser step.

    Returns:
        Bytes kept for backward, the loss, and what there is to say of exact predictions on disk.
    """
    config, accelerator = run.config, run.accelerator
    batches = run.data.batches(
        global_batch=run.at_once,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    run.wrapped.train()
    held, on_disk = Held(run.student), list[str]()
    for batch in islice(batches, 1):
        names = [(config.seed, "dry run", row) for row in range(len(batch))]
        if config.stores_predictions:
            filling = Filling(run, run.data)
            aims = list(filling.aims(batch, names))
            aim, size = aims[0], filling.estimate(aims)
            on_disk = [f"exact predictions on disk: about {_gib(size)} in {filling.folder}"]
        else:
            aim = run.aims.aim(batch, names)
        with held:
            losses = step_losses(run, aim, 0)
        accelerator.backward(losses["loss"])
        run.optimiser.step()
        run.optimiser.zero_grad()
    return held.bytes, float(losses["denoising"].detach()), on_disk


def _about(run: Run) -> list[str]:
    config, world = run.config, run.accelerator.num_processes
    base = sum(p.numel() for p in run.frozen.model.parameters())
    saved = run.method.saved_parameters()
    return [
        run.data.summary().text(run.at_once, world),
        f"effective batch: {run.per_step} "
        f"({config.train_batch_size} x {world} processes x {config.gradient_accumulation_steps} "
        "accumulated)",
        f"steps: {run.total:,}",
        f"base: {run.frozen.base.name}, {base:,} parameters, predicts {run.frozen.prediction}"
        + (" and learns sigma" if run.frozen.learns_sigma else ""),
        f"trained ({config.method}): {saved:,} parameters in the file ({saved / base:.2%})",
    ]


def _memory(run: Run, held: int) -> list[str]:
    """The estimate: weights, trained values with their copies, and what a step keeps."""
    frozen = run.frozen
    parts = [frozen.model, frozen.vae, *frozen.encoders.values(), *frozen.vision.values()]
    exact = run.exact
    if exact is not None and exact.model is not frozen.model and not run.config.stores_predictions:
        parts.append(exact.model)  # weights that both share are counted twice
    modules = [part for part in parts if isinstance(part, nn.Module)]
    weights = weight_bytes(modules, frozen.swapped_blocks if frozen.swapped else ())
    copies = 4 if run.average.ema is None else 5  # values, gradients, two moments, average
    trained = sum(p.numel() for p in run.method.trainable().values()) * 4 * copies
    total = weights.device + trained + held
    lines = [
        f"estimated memory: weights {_gib(weights.device)} + trained values with optimiser "
        f"{_gib(trained)} + kept for backward {_gib(held)} = {_gib(total)}"
    ]
    if weights.cpu:
        lines.append(f"{_gib(weights.cpu)} of weights stay in the memory of the CPU")
    return lines


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
