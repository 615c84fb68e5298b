"""The objectives' formulas against their definitions."""

from __future__ import annotations

import pytest
import torch

from dmp_common import PatchError
from dmp_common.patch import objectives


def predictions(count: int = 3) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 3, 3, generator=source) for _ in range(count)]


def test_guidance_is_a_line_through_both_predictions() -> None:
    conditional, unconditional = predictions(2)
    # Exactly, also where rounding would say otherwise: such an item has no gap to learn.
    assert torch.equal(objectives.guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(objectives.guided(conditional, unconditional, 0.0), unconditional)
    scales = torch.tensor([1.0, 2.0, 4.5, 0.0])
    mixed = objectives.guided(conditional, unconditional, scales)
    for item, scale in enumerate(scales.tolist()):
        one = objectives.guided(conditional[item], unconditional[item], scale)
        assert torch.equal(mixed[item], one)
    torch.testing.assert_close(mixed[1], 2 * conditional[1] - unconditional[1])


def test_strength_and_scale_of_guidance_are_each_others_inverse() -> None:
    scales = torch.tensor([1.0, 2.5, 4.5, 6.0])
    strengths = objectives.strength_of_guidance(scales, 4.5)
    assert strengths[0] == 0 and strengths[2] == 1 and strengths[3] > 1
    torch.testing.assert_close(objectives.guidance_of_strength(strengths, 4.5), scales)
    for dial in (objectives.strength_of_guidance, objectives.guidance_of_strength):
        with pytest.raises(PatchError, match="greatest guidance scale other than 1"):
            dial(2.0, 1.0)


def test_share_repaired_is_of_the_means() -> None:
    before = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    after = torch.tensor([[1.0, 0.0, 1.5], [1.0, 0.0, 1.5]])
    shares = objectives.share_repaired(before, after)
    assert shares[0] == 0.5 and shares[1].isnan() and shares[2] == -0.5


def test_levels_weighted_count_alike() -> None:
    gaps = torch.tensor([8.0, 0.5, 0.0])
    weights = objectives.level_weights(gaps)
    torch.testing.assert_close(weights[:2] * gaps[:2], gaps.double().mean().expand(2))
    assert weights[2] == 1


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_parabola_of_a_linear_prediction_is_lowest_at_its_strength(strength: float) -> None:
    base, change, off = predictions()
    # A part that no strength reaches, at right angles to the change.
    off = off - (off * change).sum() / change.square().sum() * change
    exact, tried = base + strength * change + off, [0.75, 1.0, 1.25]
    losses = [float(objectives.squared_distance(base + s * change, exact).mean()) for s in tried]
    assert objectives.lowest_of_parabola(tried, losses) == pytest.approx(strength, rel=1e-3)
    assert objectives.lowest_of_parabola(tried, [1.0, 2.0, 1.0]) is None
    assert objectives.lowest_of_parabola(tried, [1.0, 1.0, 1.0]) is None


def test_distances_are_means_over_places_and_masks_hide() -> None:
    one, other = predictions(2)
    found = objectives.squared_distance(one, other)
    torch.testing.assert_close(found, (one - other).square().mean((1, 2, 3)))
    mask = torch.zeros(4, 1, 3, 3)
    mask[1] = 1
    hidden = objectives.squared_distance(one, other, mask)
    assert hidden[0] == 0 and hidden[1] == found[1]
    with pytest.raises(PatchError, match="of one shape"):
        objectives.squared_distance(one, other[:, :1])


def test_own_samples_push_away() -> None:
    values = torch.tensor([0.5, -1.0])
    assert objectives.negated(values, 2.0).tolist() == [-1.0, 2.0]
    assert objectives.two_sided_strengths(1, 2).tolist() == [1.0, -1.0, -1.0]
