"""What a patch can be trained for, as pure functions of a model's predictions.

Nothing here knows a model, a sampler or a trainer, so the trainer and a host's training node
compute the same. F is the exact call of a frozen base (full precision, guidance with two
evaluations), S the cheap call (quantised weights, one evaluation), S_p the cheap call with a patch.

    data       || eps_p(x_t, t, c) - eps ||^2               the paper's
    distill    || S_p(x_t, t, c) - F(x_t, t, c) ||^2        the gap between cheap and exact call
    own        `data` on the base's own samples, and the trained values times -weight on saving
    two-sided  `data` with the patch at strength +1, own samples with the patch at strength -1

Sources: Ham et al. 2025 (data); Hinton et al. 2015, Li et al. 2023 (Q-Diffusion), He et al. 2024
(EfficientDM) for distillation of a quantised model; Ho and Salimans 2022, Meng et al. 2023 for
guidance; Alemohammad et al. 2025 (Neon) for own samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmp_common.errors import PatchError


def squared_distance(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared distance of each item's prediction to its target.

    Args:
        prediction, target: (B, ...), of one shape.
        mask: broadcast to them, how much each place counts; None if all count alike. The mean is
            over all places, so that a hidden place counts as a distance of 0.

    Returns:
        (B,) float32.

    Raises:
        PatchError: the shapes differ.

    >>> squared_distance(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    if prediction.shape != target.shape:
        raise PatchError(
            f"expected a prediction and a target of one shape, found {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}: compare the same channels of both."
        )
    squares = (prediction.float() - target.float()).square()
    return (squares if mask is None else squares * mask).flatten(1).mean(1)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """The guided prediction u + w (c - u), which takes two evaluations of a model.

    Args:
        conditional, unconditional: predictions c and u (B, ...).
        scale: w, one number or one for each item (B,); 1 gives the conditional prediction itself.

    Returns:
        (B, ...).

    Source: Ho and Salimans 2022, in the form with w = 1 for no guidance.
    """
    if isinstance(scale, Tensor):
        scale = _of_items(scale, conditional)
        plain = scale == 1
    else:
        plain = torch.tensor(scale == 1, device=conditional.device)
    mixed = unconditional + scale * (conditional - unconditional)
    # u + (c - u) is c only up to rounding.
    return torch.where(plain, conditional, mixed)


def strength_of_guidance(scale: float | Tensor, greatest: float) -> float | Tensor:
    """The strength of a guidance patch that stands for the scale w: (w - 1) / (w_max - 1).

    Args:
        scale: w, a number or (B,).
        greatest: w_max, the scale that strength 1 stands for.

    Raises:
        PatchError: w_max is 1, so that no strength stands for anything else.

    >>> strength_of_guidance(3.0, 5.0)
    0.5
    """
    _require_dial(greatest)
    return (scale - 1) / (greatest - 1)


def guidance_of_strength(strength: float | Tensor, greatest: float) -> float | Tensor:
    """The guidance scale 1 + s (w_max - 1) that the strength s of a guidance patch stands for.

    Args:
        strength: s, a number or (B,).
        greatest: w_max, see `strength_of_guidance`.

    Raises:
        PatchError: w_max is 1.

    >>> guidance_of_strength(0.5, 5.0)
    3.0
    """
    _require_dial(greatest)
    return 1 + strength * (greatest - 1)


def share_repaired(before: Tensor, after: Tensor) -> Tensor:
    """The share of a gap that a patch has closed: 1 - ||S_p - F||^2 / ||S - F||^2.

    It is 1 where the cheap call has become the exact one, 0 where nothing has changed, and negative
    where the gap has grown.

    Args:
        before: squared distances of the cheap call to the exact one (..., N).
        after: the same of the cheap call with the patch, on equal inputs.

    Returns:
        (N,): the share over all leading axes, a ratio of means and not a mean of ratios, so that
        items without a gap do not count more than others. NaN where there was no gap.

    >>> share_repaired(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 2.0]]))
    tensor([0.7500, 0.0000])
    """
    leading = tuple(range(before.ndim - 1))
    ahead, left = (x.double().sum(leading) if leading else x.double() for x in (before, after))
    share = torch.where(ahead > 0, 1 - left / ahead, torch.nan)
    return share.to(before.dtype)


def level_weights(gaps: Tensor) -> Tensor:
    """Weights with which every noise level counts alike: the mean gap over the gap there.

    The gap between two calls of a model differs by orders of magnitude along the schedule, so that
    the plain mean is about a few noise levels alone. With these weights the weighted gap of the
    call without a patch is the same everywhere, and the loss is about the share repaired.

    Args:
        gaps: mean gap in each range of timesteps (bins,), of the call without a patch.

    Returns:
        (bins,) float64; 1 in ranges without a gap, where there is nothing to learn.
    """
    positive = gaps.double().clamp(min=0)
    weights = positive.mean() / positive
    return torch.where(positive > 0, weights, 1.0)


def lowest_of_parabola(strengths: Sequence[float], losses: Sequence[float]) -> float | None:
    """The strength at which the parabola through three measured losses is lowest.

    A prediction that is linear in the strength has a squared distance to its target that is a
    parabola of it.

    Args:
        strengths, losses: three of each; the strengths differ.

    Returns:
        None where the parabola has no lowest place.

    >>> lowest_of_parabola([0.0, 1.0, 2.0], [4.0, 1.0, 0.0])
    2.0
    """
    (a, b, c), (fa, fb, fc) = strengths, losses
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    curvature = (right - left) / (c - a)
    if curvature <= 0:
        return None
    return (a + b) / 2 - left / (2 * curvature)


def negated(values: Tensor, weight: float = 1.0) -> Tensor:
    """The trained values times -weight: away from what training on own samples leads to.

    Args:
        values: of any shape; 0 stands for the base.
        weight: how far to go beyond the base, in units of what was trained.

    Source: Alemohammad et al. 2025, "Neon: Negative Extrapolation from Self-Training".
    """
    return -weight * values


def two_sided_strengths(data: int, own: int, device: torch.device | None = None) -> Tensor:
    """The strength of each item of a mixed batch: +1 for data, then -1 for own samples.

    Args:
        data, own: number of items of each kind.
        device: of the result.

    Returns:
        (data + own,) float32.

    >>> two_sided_strengths(2, 1)
    tensor([ 1.,  1., -1.])
    """
    signs = torch.ones(data + own, device=device)
    signs[data:] = -1
    return signs


def _of_items(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in a shape that multiplies items (B, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _require_dial(greatest: float) -> None:
    if greatest == 1:
        raise PatchError(
            "expected a greatest guidance scale other than 1, found 1, which is no guidance: give "
            "the scale that strength 1 shall stand for."
        )
