"""The loss on held-out images: of each image, in each bin of timesteps.

Base and trained model, evaluated with equal arguments, see equal noise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from training.base.families.family import Given
from training.objective.error import masked_mean
from training.objective.inputs import Inputs
from training.objective.noise import held_out_draws
from training.objective.noising import Process
from training.objective.student import Student
from training.objective.teacher import without

# The target (B, C, H, W) of predictions: from a name of the question, noisy data (B, C, H, W),
# timesteps (B,) and conditions.
Target = Callable[[Hashable, Tensor, Tensor, Given], Tensor]
# The sides of guidance whose gaps are measured.
SIDES = ("conditional", "unconditional", "difference")


class Question(NamedTuple):
    """Noisy held-out data, in one bin of timesteps.

    Args:
        bin: its number.
        name: of the question.
        noisy, noise: (B, C, H, W).
        t: (B,).
    """

    bin: int
    name: Hashable
    noisy: Tensor
    noise: Tensor
    t: Tensor


def losses_by_bin(
    student: Student,
    process: Process,
    inputs: Inputs,
    *,
    bins: int,
    draws: int,
    name: object,
    target: Target | None = None,
) -> Tensor:
    """Squared error of each image of a batch in each of `bins` equal ranges of timesteps.

    Args:
        student: the base, or the base with what was trained on it.
        process: how the base's data become noisy.
        inputs: B images, encoded, on the student's device.
        draws: timesteps and noises for each image and bin.
        name: what the draws depend on, besides image, bin and number: never on batch or model.
        target: what the prediction should be; None for the noise (or v, or the flow) itself.

    Returns:
        (B, bins) float64 on the CPU, least noisy first, means over the draws.
    """
    given, masks = inputs.given, inputs.masks
    losses = torch.zeros(len(inputs.keys), bins, dtype=torch.float64)
    for asked in _questions(process, inputs, bins, draws, name):
        if target is None:
            wanted = process.target(inputs.clean, asked.noise, asked.t).float()
        else:
            wanted = target(asked.name, asked.noisy, asked.t, given)
        with torch.no_grad():
            errors = student.squared_error(asked.noisy, asked.t, given, wanted, masks)
        losses[:, asked.bin] += errors.double().cpu()
    return losses / draws


def gaps_of_sides(
    student: Student,
    process: Process,
    inputs: Inputs,
    nothing: Given,
    target: Target,
    *,
    bins: int,
    draws: int,
    name: object,
) -> Tensor:
    """Squared gaps of the conditional and the unconditional prediction and of their difference.

    Guidance multiplies the difference of both predictions, so that a gap in it counts more than one
    in either.

    Args:
        student, process, inputs, bins, draws, name: see `losses_by_bin`.
        nothing: the unconditional side, tensors (1, ...) by name.
        target: the exact prediction.

    Returns:
        (3, B, bins) float64 on the CPU, in the order of `SIDES`.
    """
    gaps = torch.zeros(len(SIDES), len(inputs.keys), bins, dtype=torch.float64)
    for asked in _questions(process, inputs, bins, draws, name):
        errors = []
        for question, given in _sides(asked, inputs.given, nothing):
            wanted = target(question, asked.noisy, asked.t, given)
            with torch.no_grad():
                found = student.prediction(asked.noisy, asked.t, given, wanted.shape[1])
            errors.append(found - wanted)
        for number, error in enumerate((*errors, errors[0] - errors[1])):
            squares = masked_mean(error.square(), inputs.masks)
            gaps[number, :, asked.bin] += squares.double().cpu()
    return gaps / draws


def ask_all(
    process: Process,
    inputs: Inputs,
    target: Target,
    nothing: Given | None,
    *,
    bins: int,
    draws: int,
    name: object,
) -> None:
    """Asks for every target that `losses_by_bin` or, with `nothing`, `gaps_of_sides` will need.

    Args:
        process, inputs, target, nothing, bins, draws, name: see there.
    """
    for asked in _questions(process, inputs, bins, draws, name):
        for question, given in _sides(asked, inputs.given, nothing):
            target(question, asked.noisy, asked.t, given)


def _sides(
    asked: Question, given: Given, nothing: Given | None
) -> Iterator[tuple[Hashable, Given]]:
    """The sides of guidance of a question, each with a name of its own."""
    yield asked.name, given
    if nothing is not None:
        yield (asked.name, SIDES[1]), without(given, nothing)


def _questions(
    process: Process, inputs: Inputs, bins: int, draws: int, name: object
) -> Iterator[Question]:
    """Noisy data of every bin, `draws` times each."""
    clean, keys = inputs.clean, inputs.keys
    for number in range(bins):
        for repeat in range(draws):
            names = [(name, key, number, repeat) for key in keys]
            noise, u = held_out_draws(names, clean.shape[1:])
            noise = noise.to(clean.device)
            t = process.bin(number, bins, u.to(clean.device))
            asked = (name, tuple(keys), number, repeat)
            yield Question(number, asked, process.noisy(clean, noise, t), noise, t)
