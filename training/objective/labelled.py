"""Losses and samples of a base in pixels with classes, such as the digits, for many images at once.

The loss and the sampler are those of every other base; here are only their inputs, made from
images and labels that are in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from dmp_common import get_base
from training.base.families.table import family_of
from training.base.frozen import FrozenBase
from training.objective.inputs import Inputs
from training.objective.losses import losses_by_bin
from training.objective.noise import draw
from training.objective.noising import process_of
from training.objective.sampling import draw_images, noises
from training.objective.student import Student
from training.options.config import TrainConfig

_BATCH = 500  # images at once; no figure depends on it


def pixel_base(name: str, model: nn.Module, scheduler: SchedulerMixin) -> FrozenBase:
    """A model that is in memory already, as the base of that name.

    Args:
        model: called as `model(x, timestep=t, class_labels=labels).sample`; in evaluation mode.
        scheduler: of diffusers; names the prediction type and the noise schedule.

    Raises:
        ValueError: the model is in training mode, where it drops labels.
    """
    if model.training:
        raise ValueError("expected a model in evaluation mode, found another: call model.eval()")
    base = get_base(name)
    return FrozenBase(model, scheduler, base, "diffusers", family_of(base))


def pixel_inputs(images: Tensor, labels: Tensor, keys: list[str]) -> Inputs:
    """Images (B, C, H, W) in [-1, 1] with labels (B,), as a batch for the student.

    Args:
        keys: names of the images, on which random draws depend.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if images.ndim != 4 or labels.ndim != 1 or not len(images) == len(labels) == len(keys) > 0:
        raise ValueError(
            "expected images (B, C, H, W), labels (B,) and B keys, found "
            f"{tuple(images.shape)}, {tuple(labels.shape)} and {len(keys)}"
        )
    _, channels, height, width = images.shape
    draws = draw([(key,) for key in keys], (channels, height, width))
    return Inputs(images, draws, {"labels": labels}, None, keys)


def labelled_losses(
    frozen: FrozenBase,
    images: Tensor,
    labels: Tensor,
    *,
    bins: int = 10,
    draws: int = 4,
    seed: int = 0,
    batch: int = _BATCH,
) -> Tensor:
    """Squared error of each image in each of `bins` equal ranges of timesteps, least noisy first.

    Args:
        frozen: the base, with whatever is on it.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,).
        draws: timesteps and noises for each image and range.
        seed: of the draws, which depend on it and on an image's place among the images.

    Returns:
        (B, bins) float64 on the CPU. The mean over ranges is the mean over uniformly drawn
        timesteps when `bins` divides their number.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    steps = int(frozen.scheduler.config.num_train_timesteps)
    if not 1 <= bins <= steps or draws < 1:
        raise ValueError(f"expected 1 to {steps} bins and a draw, found {bins} and {draws}")
    keys = [str(number) for number in range(len(images))]
    config = TrainConfig(base=frozen.base.name)
    process = process_of(frozen.scheduler, config)
    student = Student(frozen, None, process, config).eval()
    device = next(frozen.model.parameters()).device
    whole = pixel_inputs(images, labels, keys)
    parts = [
        losses_by_bin(
            student, process, whole.rows(rows.tolist()).to(device), bins=bins, draws=draws,
            name=("labelled", seed),
        )
        for rows in torch.arange(len(images)).split(batch)
    ]  # fmt: skip
    return torch.cat(parts)


def labelled_samples(
    frozen: FrozenBase,
    labels: Tensor,
    *,
    seed: int,
    steps: int = 50,
    scale: float = 1.0,
    sampler: str = "default",
    batch: int = _BATCH,
) -> Tensor:
    """One picture for each label, (B, C, H, W) in [-1, 1], float32 on the CPU.

    Args:
        frozen: the base, with whatever is on it.
        labels: (B,).
        seed: of the noise, which depends on it and on a label's place among the labels: pictures
            of two models can be compared one by one.
        scale: of classifier-free guidance; 1 for none.

    Raises:
        ValueError: labels that are not (B,).
        PatchError: an unknown sampler.
    """
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"expected labels (B,) with B >= 1, found shape {tuple(labels.shape)}")
    config: Any = frozen.model.config
    shape, parts = (frozen.channels, config.sample_size, config.sample_size), []
    device = next(frozen.model.parameters()).device
    for rows in torch.arange(len(labels)).split(batch):
        noise, sources = noises([(seed, int(row)) for row in rows], shape)
        conditional, unconditional = {"labels": labels[rows]}, None
        if scale != 1:
            unconditional = {"labels": torch.full_like(labels[rows], int(frozen.null_label or 0))}
        parts.append(
            draw_images(
                frozen, noise.to(device), conditional, unconditional, steps=steps, scale=scale,
                sampler=sampler, generators=sources,
            )
        )  # fmt: skip
    return torch.cat(parts)
