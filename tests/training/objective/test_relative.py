"""--relative_loss: every noise level counts by its share of the base's own loss."""

import pytest
import torch

from dmp_common.patch.levels import BINS, RelativeWeights
from training.objective.relative import relative_config, warn_of_rounding


def test_the_weighted_loss_of_the_base_is_its_mean_at_every_timestep():
    losses = torch.tensor([0.3, 0.1, 0.02, 0.001])
    weights = RelativeWeights(losses)
    centres = torch.tensor([125, 375, 625, 875])
    torch.testing.assert_close(weights(centres) * losses, losses.mean().expand(4))
    between = weights(torch.tensor([250.0]))  # geometric mean of its neighbours
    torch.testing.assert_close(between, (weights(centres[:1]) * weights(centres[1:2])).sqrt())
    ends = weights(torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(ends, weights(centres[[0, 3]]))


def test_one_range_weights_alike_and_bad_losses_are_told():
    assert RelativeWeights(torch.tensor([0.2]))(torch.tensor([3, 900])).tolist() == [1, 1]
    for bad in ([0.1, 0.0], [0.1, float("nan")], [[0.1]]):
        with pytest.raises(ValueError, match="expected positive losses"):
            RelativeWeights(torch.tensor(bad))


def test_training_takes_the_weights_from_the_base(start):
    plain, _ = start()
    assert plain.student.relative is None
    plain.method.remove()
    run, _ = start(relative_loss=True)
    relative = run.student.relative
    assert relative is not None and len(relative.logs) == BINS
    student, clean = run.student, torch.zeros(2, 1, 8, 8)
    t, given = torch.tensor([30, 960]), {"labels": torch.tensor([1, 2])}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = run.process.noisy(clean, noise, t)
    weighted = student(noisy, t, given, noise, 0)["samples"]
    student.relative = None
    unweighted = student(noisy, t, given, noise, 0)["samples"]
    torch.testing.assert_close(weighted, unweighted * relative(t))
    assert (relative(t) != 1).all()
    run.method.remove()


@pytest.mark.parametrize(
    ("precision", "least", "warned"),
    [("bf16", 5e-5, True), ("bf16", 1e-3, False), ("fp16", 5e-5, False), ("no", 1e-9, False)],
)
def test_losses_as_small_as_rounding_are_told(precision, least, warned, recwarn):
    warn_of_rounding(torch.tensor([0.2, least]), precision)
    assert [str(w.message).endswith("Use --mixed_precision no.") for w in recwarn] == [
        True
    ] * warned


def test_how_it_is_measured():
    from training.options.config import TrainConfig

    config = relative_config(TrainConfig(validation_bins=3))
    assert (config.validation_bins, config.validation_draws) == (BINS, 1)
