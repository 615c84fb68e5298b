"""The training loop: one page, top to bottom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dmp_common import PatchError
from training.data.batch import Batch
from training.objective.aim import Aim
from training.run.parts import Run
from training.run.progress import Progress, rate_of
from training.run.scale import average_gradients


class Events:
    """What happens beside the steps; see `training/run/events.py`."""

    def before(self, run: Run, progress: Progress) -> None:
        """Before the first step."""

    def after_step(self, run: Run, progress: Progress, epoch_ended: bool) -> None:
        """After every optimiser step."""


def train(run: Run, events: Events) -> None:
    """Trains until `run.total` steps are done.

    Raises:
        PatchError: a loss is not finite; it names the sample, and no file is written.
    """
    config, accelerator = run.config, run.accelerator
    batches = _batches(run)
    micro = run.step * config.gradient_accumulation_steps
    run.wrapped.train()
    with Progress(config, accelerator, run.step, run.total) as progress:
        events.before(run, progress)
        progress.pause()
        while run.step < run.total:
            epoch, sums = run.position.epoch, Counter[str]()
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches)
                aim = run.aims.aim(batch, _names(run, len(batch), micro))
                with accelerator.accumulate(run.wrapped):
                    losses = step_losses(run, aim, micro)
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        update(run)
                sums.update({name: float(value.detach()) for name, value in losses.items()})
                micro += 1
            run.step, run.position = run.step + 1, batch.next
            run.average.update()
            run.history.losses = _mean(run, sums)
            progress.step(run.step, epoch, run.history.losses, rate_of(run.optimiser))
            events.after_step(run, progress, run.position.epoch > epoch)


def _batches(run: Run) -> Iterator[Batch]:
    config, accelerator = run.config, run.accelerator
    return run.data.batches(
        global_batch=run.at_once,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=run.position,
        workers=config.max_data_loader_n_workers,
        persistent=config.persistent_data_loader_workers,
    )


def _names(run: Run, count: int, micro: int) -> list[tuple[object, ...]]:
    """What each sample's draws depend on: seed, micro-step, position in the global batch."""
    first = run.accelerator.process_index * count
    return [(run.config.seed, "sample", micro, first + row) for row in range(count)]


def step_losses(run: Run, aim: Aim, micro: int) -> dict[str, Tensor]:
    """The losses of this process's samples, checked."""
    run.method.draw(_names(run, len(aim.noisy), micro))
    with run.accelerator.autocast(), run.method.at(aim.strengths):
        losses: dict[str, Tensor] = run.wrapped(
            aim.noisy, aim.t, aim.given, aim.target, micro, aim.weights, aim.masks, aim.clean
        )
    samples = losses.pop("samples").detach()
    bad = ~(samples.isfinite() & losses["loss"].isfinite())
    # All processes must stop, or the others wait for this one for ever.
    anywhere = run.accelerator.reduce(bad.any().float(), reduction="sum")
    if anywhere > 0:
        raise _not_finite(run, aim, samples, losses)
    return losses


def _mean(run: Run, sums: Mapping[str, float]) -> dict[str, float]:
    """Mean losses of an optimiser step over its micro-steps and all processes."""
    values = torch.tensor(list(sums.values()), device=run.device)
    values = run.accelerator.reduce(values, reduction="mean")
    return dict(zip(sums, (values / run.config.gradient_accumulation_steps).tolist(), strict=True))


def update(run: Run) -> None:
    """One optimiser step with the gradients that are there.

    Raises:
        PatchError: a gradient is not finite, which would spoil all values for good.
    """
    accelerator, config = run.accelerator, run.config
    if run.sharded:
        average_gradients(run.method.trainable().values())
    # Without a limit this only measures.
    limit = config.max_grad_norm or math.inf
    norm = accelerator.clip_grad_norm_(run.method.trainable().values(), limit)
    # The scaler of fp16 leaves such a step out. DeepSpeed measures no norm here.
    if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
        raise PatchError(
            f"expected finite gradients, found others at step {run.step + 1}, though its loss is "
            "finite: lower --learning_rate or use --mixed_precision no; no file was overwritten."
        )
    run.optimiser.step()
    if not accelerator.optimizer_step_was_skipped:
        run.schedule.step()
    run.optimiser.zero_grad()


def _not_finite(run: Run, aim: Aim, samples: Tensor, losses: dict[str, Tensor]) -> PatchError:
    bad = [row for row, fine in enumerate(samples.isfinite().tolist()) if not fine]
    named = ", ".join(f"{aim.keys[row]} (timestep {float(aim.t[row]):.0f})" for row in bad[:4])
    parts = ", ".join(f"{name} {float(loss.detach()):.3g}" for name, loss in losses.items())
    where = f"sample {named}" if named else "no sample by itself"
    safer = {"fp16": "bf16", "bf16": "no"}.get(run.accelerator.mixed_precision)
    other = f", or use --mixed_precision {safer}" if safer else ""
    return PatchError(
        f"expected finite losses, found {parts} at step {run.step + 1}, {where}: look at that "
        f"image, lower --learning_rate or --gate_lr_factor{other}; no file was overwritten."
    )
