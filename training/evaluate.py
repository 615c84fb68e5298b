"""What a further-trained model is judged by: denoising loss per timestep bin, Frechet distance.

Every function is pure: it draws from its own seed, leaves the model in the mode it was in, and
knows no data set. Base and patched model, evaluated with equal arguments, see equal draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import nn

from training.options_model import ObjectiveOptions
from training.process import Process, process_of


def denoising_loss_by_bin(
    model: nn.Module,
    scheduler: SchedulerMixin,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    bins: int = 10,
    draws: int = 4,
    seed: int = 0,
    batch_size: int = 256,
) -> torch.Tensor:
    """Mean squared error of the model's prediction in each of `bins` equal timestep ranges.

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
    timesteps = scheduler.config.num_train_timesteps
    _check_labelled(images, labels)
    if not 1 <= bins <= timesteps:
        raise ValueError(f"expected 1 to {timesteps} bins, found {bins}")
    if draws < 1 or batch_size < 1:
        raise ValueError(f"expected draws and batch_size >= 1, found {draws} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    process = process_of(scheduler, ObjectiveOptions())
    loss = torch.zeros(bins, dtype=torch.float64)
    with _evaluating(model):
        for b in range(bins):
            first, end = b * timesteps // bins, (b + 1) * timesteps // bins
            for _ in range(draws):
                t = torch.randint(first, end, labels.shape, generator=generator)
                noise = torch.randn(images.shape, generator=generator)
                loss[b] += _squared_error(model, process, images, labels, t, noise, batch_size)
    return loss / (draws * images.numel())


def sample(
    model: nn.Module,
    scheduler: SchedulerMixin,
    labels: torch.Tensor,
    *,
    seed: int,
    steps: int = 50,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    batch_size: int = 500,
) -> torch.Tensor:
    """Draw one image per label with deterministic DDIM (eta 0), classifier-free guided.

    Args:
        model: diffusers model with `config.in_channels` and `config.sample_size`.
        scheduler: any diffusers scheduler; DDIM takes over its betas and prediction type.
        labels: (B,) class ids.
        seed: decides the initial noise alone; image i is comparable between two models.
        guidance_scale: w in uncond + w (cond - uncond); 1 evaluates the conditional branch only.
        null_label: class id that means "no class"; by default the DiT's number of classes.

    Returns:
        (B, C, H, W) float32 on the CPU, clipped to [-1, 1].

    Raises:
        ValueError: labels are not (B,), or guidance is asked for without a null label.

    Source: Song et al. 2021 (DDIM); Ho and Salimans 2022 (guidance).
    """
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"expected labels (B,) with B >= 1, found shape {tuple(labels.shape)}")
    if null_label is None:
        null_label = getattr(model.config, "num_embeds_ada_norm", None)
    if guidance_scale != 1 and null_label is None:
        raise ValueError("guidance needs the model's null class: pass null_label")
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (labels.shape[0], model.config.in_channels, height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with _evaluating(model):
        parts = [
            _denoise(model, ddim, x, y, guidance_scale, null_label)
            for x, y in zip(noise.split(batch_size), labels.split(batch_size), strict=True)
        ]
    return torch.cat(parts).clamp(-1, 1)


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets (A, F) and (B, F).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), unbiased covariances, float64.
    The root's trace is taken from the eigenvalues of the symmetric product, so it needs no scipy
    and stays real where C_a C_b is singular or ill-conditioned.

    Raises:
        ValueError: not two (samples, F) matrices, fewer than two samples, or non-finite values.

    Source: Heusel et al. 2017; Dowson and Landau 1982.
    """
    mean_a, covariance_a = _moments(features_a, "features_a")
    mean_b, covariance_b = _moments(features_b, "features_b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"expected feature sets of one width, found {mean_a.shape[0]} and {mean_b.shape[0]}"
        )
    values, vectors = torch.linalg.eigh(covariance_a)
    # Rounding makes zero eigenvalues slightly negative; their root would be NaN.
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ covariance_b @ root_a
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    distance = (mean_a - mean_b).square().sum() + traces - 2 * overlap
    return max(float(distance), 0.0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule then returns to its own former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _predict(
    model: nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The model's prediction (B, C, H, W); a learned variance behind it is cut off."""
    return model(x, timestep=t, class_labels=labels).sample[:, : x.shape[1]]


def _squared_error(
    model: nn.Module,
    process: Process,
    images: torch.Tensor,
    labels: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    batch_size: int,
) -> float:
    """Squared error summed over all images (B, C, H, W) with noise of that shape, t (B,)."""
    like = next(model.parameters())
    total = 0.0
    for rows in torch.arange(len(labels)).split(batch_size):
        x0, eps = (part[rows].to(like.device, like.dtype) for part in (images, noise))
        y, steps = labels[rows].to(like.device), t[rows].to(like.device)
        target = process.target(x0, eps, steps)
        prediction = _predict(model, process.noisy(x0, eps, steps), steps, y)
        total += float((prediction.float() - target.float()).double().square().sum())
    return total


def _denoise(
    model: nn.Module,
    ddim: DDIMScheduler,
    noise: torch.Tensor,
    labels: torch.Tensor,
    guidance_scale: float,
    null_label: int | None,
) -> torch.Tensor:
    """Run all DDIM steps on one batch of initial noise (B, C, H, W)."""
    like = next(model.parameters())
    x, labels = noise.to(like.device, like.dtype), labels.to(like.device)
    guided = guidance_scale != 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    for step in ddim.timesteps:
        t = step.to(like.device).expand(labels.shape[0])
        prediction = _predict(model, torch.cat([x, x]) if guided else x, t, labels)
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        x = ddim.step(prediction, step, x, eta=0.0).prev_sample
    return x.float().cpu()


def _check_labelled(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise ValueError unless images are (B, C, H, W) and labels (B,) with the same B >= 1."""
    fits = images.ndim == 4 and labels.ndim == 1 and len(images) == len(labels) > 0
    if not fits:
        raise ValueError(
            "expected images (B, C, H, W) and labels (B,), "
            f"found {tuple(images.shape)} and {tuple(labels.shape)}"
        )


def _moments(features: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and unbiased covariance (F, F) of features (samples, F), in float64."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"expected {name} as (samples, F), found {tuple(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"expected at least 2 samples in {name}, found {len(features)}")
    features = features.detach().cpu().double()
    if not torch.isfinite(features).all():
        raise ValueError(f"expected finite values in {name}, found NaN or infinity")
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)
