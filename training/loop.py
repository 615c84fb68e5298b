"""The training loop: one page, top to bottom."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dmp_common import Patch, PatchError
from training.config import TrainConfig
from training.frozen import FrozenBase
from training.objective import Student, parameter_groups

Validate = Callable[[], float]


@dataclass
class History:
    """What happened: validation loss by step, and which step was kept."""

    validation: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    frozen: FrozenBase,
    patch: Patch,
    data: Any,
    validate: Validate,
) -> History:
    """Trains a patch in place; it ends with the averaged values that validated best.

    Args:
        config: of the run.
        accelerator: devices, precision, accumulation.
        frozen: the base; never changed.
        patch: new, or one to go on with.
        data: a map-style data set of {"pixels" (C, H, W), "label" ()}.
        validate: the validation loss of the base with the patch as it is now.

    Raises:
        PatchError: the loss is not finite; the patch then holds the last good values.
    """
    torch.manual_seed(config.seed)
    patch.scale_for_learning()
    student = Student(frozen, patch, config)
    optimizer = torch.optim.AdamW(
        parameter_groups(student, config), weight_decay=config.weight_decay
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    loader = DataLoader(
        data,
        batch_size=config.train_batch_size,
        shuffle=True,
        drop_last=len(data) > config.train_batch_size,
        num_workers=config.max_data_loader_n_workers,
        generator=torch.Generator().manual_seed(config.seed),
    )
    student, optimizer, schedule, loader = accelerator.prepare(student, optimizer, schedule, loader)
    average = _average(patch, config)
    # Each process draws its own noise.
    generator = torch.Generator().manual_seed(config.seed * 10007 + accelerator.process_index)
    history = History()
    best = _keep_best(patch, average, validate, history, step=0)

    student.train()
    batches = _forever(loader)
    with tqdm(
        total=config.max_train_steps,
        desc="training",
        unit="step",
        file=sys.stdout,
        disable=not accelerator.is_local_main_process,
    ) as bar:
        while bar.n < config.max_train_steps:
            batch = next(batches)
            with accelerator.accumulate(student):
                losses = student(batch["pixels"], batch["label"], generator)
                _require_finite(losses, bar.n, patch, best)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and config.max_grad_norm:
                    accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            if average is not None:
                average.update_parameters(patch)
            bar.update()
            history.losses = {name: float(loss.detach()) for name, loss in losses.items()}
            if bar.n % config.validate_every_n_steps == 0 or bar.n == config.max_train_steps:
                best = _keep_best(patch, average, validate, history, bar.n, best)
                student.train()
            bar.set_postfix(
                loss=f"{history.losses['denoising']:.4f}",
                validation=f"{history.validation[max(history.validation)]:.4f}",
            )
    accelerator.unwrap_model(student).attachment.remove()
    patch.load_tensors(best)
    patch.eval()
    return history


def _forever(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def _average(patch: Patch, config: TrainConfig) -> AveragedModel | None:
    """Exponential moving average of the patch, which is what validates and is saved."""
    if not config.ema_decay:
        return None
    return AveragedModel(patch, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))


def _keep_best(
    patch: Patch,
    average: AveragedModel | None,
    validate: Validate,
    history: History,
    step: int,
    best: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Validates the averaged patch; returns the tensors of the best one so far."""
    with _holding(patch, average):
        history.validation[step] = step_loss = validate()
        # Step 0 is the base, to compare with; a run that never beats it still leaves its best.
        beaten = history.best_step and step_loss >= history.validation[history.best_step]
        if best is not None and beaten:
            return best
        history.best_step = step
        return {name: tensor.clone() for name, tensor in patch.tensors().items()}


@contextmanager
def _holding(patch: Patch, average: AveragedModel | None) -> Iterator[None]:
    """The patch with its averaged values, and its own again afterwards."""
    if average is None:
        yield
        return
    own = {name: value.clone() for name, value in patch.state_dict().items()}
    patch.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        patch.load_state_dict(own)


def _require_finite(
    losses: dict[str, Tensor], step: int, patch: Patch, best: dict[str, Tensor]
) -> None:
    if all(bool(loss.isfinite()) for loss in losses.values()):
        return
    patch.load_tensors(best)
    found = ", ".join(f"{name} {float(loss.detach()):.3g}" for name, loss in losses.items())
    raise PatchError(
        f"expected finite losses, found {found} at step {step + 1}: lower --learning_rate or "
        "--gate_lr_factor; no file was overwritten."
    )
