"""--choose_strength: the strength that validates best, which is folded into the trained values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmp_common.patch.objectives import lowest_of_parabola
from training.methods.method import Method

TRIED = (0.75, 1.25)  # besides 1
LIMITS = (0.25, 2.0)


def choose_strength(
    method: Method, losses_at_one: Tensor, images: Callable[[], Tensor]
) -> tuple[float, Tensor]:
    """Finds the strength with the lowest held-out loss and scales the trained values by it.

    The loss is a parabola of the strength where the prediction is linear in it, so three strengths
    tell where it is lowest. What they tell is measured, too, and taken only if it is true.

    Args:
        method: whose values are final.
        losses_at_one: held-out losses (images, bins) of the values as they are.
        images: measures such losses of the values as they are when it is called.

    Returns:
        The strength, and the losses with it.
    """
    kept = {name: value.detach().clone() for name, value in method.trainable().items()}

    def measured(strength: float) -> Tensor:
        method.scale(strength)
        losses = images()
        with torch.no_grad():
            for name, value in method.trainable().items():
                value.copy_(kept[name])
        return losses

    found = {1.0: losses_at_one, **{strength: measured(strength) for strength in TRIED}}
    means = {strength: float(losses.mean()) for strength, losses in found.items()}
    lowest = lowest_of_parabola(list(means), list(means.values()))
    if lowest is not None:
        lowest = round(min(max(lowest, LIMITS[0]), LIMITS[1]), 4)
        found[lowest] = measured(lowest)
        means[lowest] = float(found[lowest].mean())
    best = min(means, key=lambda strength: (means[strength], abs(strength - 1)))
    if best != 1:
        method.scale(best)
    return best, found[best]
