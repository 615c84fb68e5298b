"""Epsilon scaling: smaller predicted noise while sampling, which needs no training.

Source: Ning et al. 2024, "Elucidating the Exposure Bias in Diffusion Models", arXiv 2308.15321.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmp_common import PatchError
from training.base.frozen import FrozenBase
from training.base.schedulers import is_flow, require_noise_prediction


@contextmanager
def epsilon_scaled(frozen: FrozenBase, factor: float) -> Iterator[FrozenBase]:
    """Divides the noise that a base predicts by a factor until the context ends.

    It is a hook on the output of `frozen.model`, so whatever else is on the model stays on it and
    counts. Every call is scaled alike; under guidance, which is linear, the guided noise is then
    scaled too. A prediction of v or of the clean picture is changed to the one that means the
    smaller noise in the same noisy picture. A learned variance stays as it is. Use it for samples
    only: a loss of the scaled model means nothing.

    Args:
        frozen: a base that predicts noise, v or the clean picture.
        factor: of the paper; usually a little above 1. 1 changes nothing and suits every base.

    Yields:
        The same base.

    Raises:
        PatchError: a factor that is not a positive number, a flow model, or a schedule whose last
            timestep has no signal. With no signal left the smaller noise would contradict the
            noisy picture, which is all noise there.

    Source: Ning et al. 2024, algorithm 2 with a constant factor.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise PatchError(f"expected a positive number as factor of the noise, found {factor}.")
    if factor == 1:
        yield frozen
        return
    require_scalable(is_flow(frozen.scheduler), frozen.base.name)
    alphas = frozen.scheduler.alphas_cumprod.double()
    if float(alphas[-1]) == 0:
        raise PatchError(
            "expected a noise schedule with some signal at its last timestep for epsilon scaling, "
            "found one without (zero terminal SNR): leave epsilon scaling out."
        )
    angles, prediction = alphas.sqrt().acos(), frozen.prediction

    def scale(
        module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any
    ) -> Any:
        noisy = inputs[0]
        t = inputs[1] if len(inputs) > 1 else given["timestep"]
        found = output[0] if isinstance(output, tuple) else output.sample
        scaled = _scaled(found, noisy, _at(angles, t), factor, prediction)
        if isinstance(output, tuple):
            return (scaled, *output[1:])
        return dataclasses.replace(output, sample=scaled)

    handle = frozen.model.register_forward_hook(scale, with_kwargs=True)
    try:
        yield frozen
    finally:
        handle.remove()


def require_scalable(flow: bool, base: str) -> None:
    """Refuses epsilon scaling of a flow model; see `require_noise_prediction`."""
    remedy = "its first noisy picture has no signal; leave epsilon scaling out."
    require_noise_prediction(flow, base, "epsilon scaling", remedy)


def _at(angles: Tensor, t: Tensor) -> Tensor:
    """The angle of each timestep (B, 1, 1, 1), float64, whose cosine scales the signal and whose
    sine scales the noise. Some samplers step to timesteps between those of the table."""
    angles, t = angles.to(t.device), t.double().reshape(-1, 1, 1, 1)
    below = t.floor().long().clamp(0, len(angles) - 1)
    above = (below + 1).clamp(max=len(angles) - 1)
    return torch.lerp(angles[below], angles[above], t - below)


def _scaled(output: Tensor, noisy: Tensor, angle: Tensor, factor: float, prediction: str) -> Tensor:
    """A prediction (B, C or 2C, H, W) whose noise is divided by a factor."""
    found, rest = output.split([noisy.shape[1], output.shape[1] - noisy.shape[1]], dim=1)
    if prediction == "epsilon":
        return torch.cat([found / factor, rest], dim=1)
    signal, noise_scale = angle.cos().to(noisy.dtype), angle.sin().to(noisy.dtype)
    if prediction == "v_prediction":
        noise = signal * found + noise_scale * noisy
        change, toward = noise / factor - noise, 1 / signal
    else:
        noise = (noisy - signal * found) / noise_scale
        change, toward = noise / factor - noise, -noise_scale / signal
    return torch.cat([(found + toward * change).to(output.dtype), rest], dim=1)
