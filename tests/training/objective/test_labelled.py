"""Losses and samples of bases in pixels against closed forms and a tiny random DiT."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from training.base.frozen import FrozenBase
from training.objective.labelled import labelled_losses, labelled_samples, pixel_base


class ConstantModel(torch.nn.Module):
    """Predicts `value` everywhere and notes the calls it gets."""

    dtype = torch.float32

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.timesteps: list[int] = []

    def forward(self, x, timestep, class_labels):
        self.timesteps += timestep.tolist()
        return type("Output", (), {"sample": torch.zeros_like(x) + self.value})


def constant(value: float, **scheduler: object) -> FrozenBase:
    return pixel_base("digits", ConstantModel(value).eval(), DDIMScheduler(**scheduler))


@pytest.fixture
def tiny() -> FrozenBase:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, dropout=0.5,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return pixel_base("digits", model.eval(), DDIMScheduler())


def labelled(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 10


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_loss_of_a_constant_prediction_is_known(kind: str) -> None:
    frozen = constant(1.0, prediction_type=kind)
    images, labels = torch.full((50, 1, 8, 8), 0.5), torch.zeros(50, dtype=torch.int64)
    losses = labelled_losses(frozen, images, labels, bins=4, draws=20)
    assert losses.shape == (50, 4) and losses.dtype == torch.float64
    loss = losses.mean(0)
    if kind == "sample":  # (1 - 0.5)^2
        torch.testing.assert_close(loss, torch.full((4,), 0.25, dtype=torch.float64))
        return
    if kind == "epsilon":  # E (1 - noise)^2
        expected = torch.full((4,), 2.0, dtype=torch.float64)
    else:  # v = alpha noise - sigma x: E (1 - v)^2 = (1 + sigma / 2)^2 + alpha^2
        alpha = frozen.scheduler.alphas_cumprod.double()
        expected = (1 + (1 - alpha).sqrt() / 2).square() + alpha
        expected = expected.view(4, 250).mean(1)
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0)


def test_every_image_sees_every_bin() -> None:
    frozen, (images, labels) = constant(0.0), labelled()
    labelled_losses(frozen, images, labels, bins=10, draws=3)
    timesteps = torch.tensor(frozen.model.timesteps)
    counts = timesteps.div(100, rounding_mode="floor").bincount(minlength=10)
    assert counts.tolist() == [3 * len(images)] * 10


def test_loss_depends_on_the_seed_and_not_on_the_batch(tiny: FrozenBase) -> None:
    images, labels = labelled()

    def losses(**options: int) -> Tensor:
        return labelled_losses(tiny, images, labels, bins=5, draws=2, **options)

    state = torch.get_rng_state()
    assert torch.equal(losses(seed=3), losses(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(losses(seed=3), losses(seed=3, batch=4))
    assert not torch.allclose(losses(seed=3), losses(seed=4), rtol=1e-3)
    few = labelled_losses(tiny, images[:2], labels[:2], bins=5, draws=2, seed=3)
    torch.testing.assert_close(few, losses(seed=3)[:2])  # of an image, not of the set


def test_what_does_not_fit_is_refused(tiny: FrozenBase) -> None:
    images, labels = labelled()
    with pytest.raises(ValueError, match="1 to 1000 bins and a draw, found 0 and 4"):
        labelled_losses(tiny, images, labels, bins=0)
    with pytest.raises(ValueError, match="found 10 and 0"):
        labelled_losses(tiny, images, labels, draws=0)
    with pytest.raises(ValueError, match=r"found \(6, 1, 8, 8\), \(5,\) and 6"):
        labelled_losses(tiny, images, labels[:5])
    with pytest.raises(ValueError, match=r"labels \(B,\)"):
        labelled_samples(tiny, torch.zeros(2, 2, dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match="evaluation mode"):
        pixel_base("digits", tiny.model.train(), tiny.scheduler)


def test_samples_follow_seed_label_and_guidance(tiny: FrozenBase) -> None:
    def drawn(labels: tuple[int, ...] = (0, 1, 2), seed: int = 0, **options: float) -> Tensor:
        return labelled_samples(tiny, torch.tensor(labels), seed=seed, steps=3, **options)

    images = drawn()
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and not images.requires_grad
    torch.testing.assert_close(drawn(batch=2), images)  # noise does not depend on batching
    assert not torch.allclose(drawn(seed=1), images)
    changed = drawn(labels=(0, 1, 7))
    torch.testing.assert_close(changed[:2], images[:2])
    assert not torch.allclose(changed[2], images[2])
    # Scale 0 is the unconditional model: the label has no say.
    torch.testing.assert_close(drawn(scale=0.0), drawn(labels=(5, 5, 5), scale=0.0))
    torch.testing.assert_close(drawn(scale=0.0), drawn(labels=(10, 10, 10)))
    assert not torch.allclose(drawn(scale=4.0), images)


def test_a_perfect_model_gives_its_picture_back() -> None:
    """A model that knows the clean picture: DDIM must arrive there from any noise."""
    clean = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    class Oracle(ConstantModel):
        config = type("Config", (), {"in_channels": 1, "sample_size": 8})

        def forward(self, x, timestep, class_labels):
            return type("Output", (), {"sample": clean.expand_as(x)})

    scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    frozen = pixel_base("digits", Oracle(0.0).eval(), scheduler)
    images = labelled_samples(frozen, torch.zeros(2, dtype=torch.int64), seed=0, steps=10)
    torch.testing.assert_close(images, clean.expand(2, 1, 8, 8), atol=1e-5, rtol=0)
