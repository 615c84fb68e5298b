"""The denoising loss on held-out images: of each image, in each bin of timesteps.

Base and trained model, evaluated with equal arguments, see equal noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.objective.inputs import Inputs
from training.objective.noise import held_out_draws
from training.objective.noising import Process
from training.objective.student import Student


def losses_by_bin(
    student: Student, process: Process, inputs: Inputs, *, bins: int, draws: int, name: object
) -> Tensor:
    """Squared error of each image of a batch in each of `bins` equal ranges of timesteps.

    Args:
        student: the base, or the base with what was trained on it.
        process: how the base's data become noisy.
        inputs: B images, encoded, on the student's device.
        draws: timesteps and noises for each image and bin.
        name: what the draws depend on, besides image, bin and number: never on batch or model.

    Returns:
        (B, bins) float64 on the CPU, least noisy first, means over the draws.
    """
    clean, given, masks = inputs.clean, inputs.given, inputs.masks
    _, channels, height, width = clean.shape
    losses = torch.zeros(len(inputs.keys), bins, dtype=torch.float64)
    for number in range(bins):
        for repeat in range(draws):
            names = [(name, key, number, repeat) for key in inputs.keys]
            noise, u = held_out_draws(names, (channels, height, width))
            noise = noise.to(clean.device)
            t = process.bin(number, bins, u.to(clean.device))
            with torch.no_grad():
                errors = student.squared_error(clean, noise, t, given, masks)
            losses[:, number] += errors.double().cpu()
    return losses / draws
