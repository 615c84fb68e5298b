"""The denoising loss on held-out images: of each image, in each bin of timesteps.

Base and trained model, evaluated with equal arguments, see equal noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from training.objective.inputs import Inputs
from training.objective.noise import Draws, draw
from training.objective.noising import Process, process_of
from training.objective.student import Student
from training.options.model_options import ObjectiveOptions


def losses_by_bin(
    student: Student, process: Process, inputs: Inputs, *, bins: int, draws: int, name: object
) -> Tensor:
    """Squared error of each image of a batch in each of `bins` equal ranges of timesteps.

    Args:
        student: the base, or the base with what was trained on it.
        process: of the base.
        inputs: B images, encoded, on the student's device.
        draws: timesteps and noises for each image and bin.
        name: what the draws depend on, besides image, bin and number: never on batch or model.

    Returns:
        (B, bins) float64 on the CPU, least noisy first, means over the draws.
    """
    losses = torch.zeros(len(inputs.keys), bins, dtype=torch.float64)
    for number in range(bins):
        for repeat in range(draws):
            names = [(name, key, number, repeat) for key in inputs.keys]
            made: Draws = draw(names, tuple(inputs.clean.shape[1:])).to(inputs.clean.device)
            t = process.bin(number, bins, made.u)
            with torch.no_grad():
                parts = student.denoising(inputs.clean, made.noise, t, inputs.given)
            losses[:, number] += parts["denoising"].double().cpu()
    return losses / draws


def denoising_loss_by_bin(
    model: nn.Module,
    scheduler: SchedulerMixin,
    images: Tensor,
    labels: Tensor,
    *,
    bins: int = 10,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Mean squared error of a pixel model's prediction in each of `bins` equal timestep ranges.

    Args:
        model: called as `model(x, timestep=t, class_labels=labels).sample`.
        scheduler: diffusers scheduler with `add_noise`; its config names the prediction type.
        images: (B, C, H, W), clean, in the model's own range.
        labels: (B,) class ids.
        draws: timesteps and noises per image and bin; every image sees every bin equally often.
        batch_size: memory only; draws do not depend on it.

    Returns:
        (bins,) float64 on the CPU, earliest (least noisy) timesteps first. The mean over bins is
        the mean over uniformly drawn timesteps when `bins` divides the number of timesteps.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown prediction type.
    """
    return denoising_losses(
        model, scheduler, images, labels, bins=bins, draws=draws, seed=seed, batch_size=batch_size
    ).mean(0)


def denoising_losses(
    model: nn.Module,
    scheduler: SchedulerMixin,
    images: Tensor,
    labels: Tensor,
    *,
    bins: int = 10,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """As `denoising_loss_by_bin`, of each image: (B, bins)."""
    timesteps = scheduler.config.num_train_timesteps
    _check_labelled(images, labels)
    if not 1 <= bins <= timesteps:
        raise ValueError(f"expected 1 to {timesteps} bins, found {bins}")
    if draws < 1 or batch_size < 1:
        raise ValueError(f"expected draws and batch_size >= 1, found {draws} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    process = process_of(scheduler, ObjectiveOptions())
    loss = torch.zeros(len(labels), bins, dtype=torch.float64)
    with evaluating(model):
        for b in range(bins):
            first, end = b * timesteps // bins, (b + 1) * timesteps // bins
            for _ in range(draws):
                t = torch.randint(first, end, labels.shape, generator=generator)
                noise = torch.randn(images.shape, generator=generator)
                loss[:, b] += _squared_error(model, process, images, labels, t, noise, batch_size)
    return loss / (draws * images[0].numel())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule then returns to its own former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _squared_error(
    model: nn.Module,
    process: Process,
    images: Tensor,
    labels: Tensor,
    t: Tensor,
    noise: Tensor,
    batch_size: int,
) -> Tensor:
    """Squared error (B,) of each image (B, C, H, W) with noise of that shape, t (B,)."""
    like = next(model.parameters())
    errors = torch.zeros(len(labels), dtype=torch.float64)
    for rows in torch.arange(len(labels)).split(batch_size):
        x0, eps = (part[rows].to(like.device, like.dtype) for part in (images, noise))
        y, steps = labels[rows].to(like.device), t[rows].to(like.device)
        target = process.target(x0, eps, steps)
        output = model(process.noisy(x0, eps, steps), timestep=steps, class_labels=y).sample
        prediction = output[:, : x0.shape[1]]  # a learned variance behind it is cut off
        square = (prediction.float() - target.float()).double().square()
        errors[rows] = square.flatten(1).sum(1).cpu()
    return errors


def _check_labelled(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless images are (B, C, H, W) and labels (B,) with the same B >= 1."""
    fits = images.ndim == 4 and labels.ndim == 1 and len(images) == len(labels) > 0
    if not fits:
        raise ValueError(
            "expected images (B, C, H, W) and labels (B,), "
            f"found {tuple(images.shape)} and {tuple(labels.shape)}"
        )
