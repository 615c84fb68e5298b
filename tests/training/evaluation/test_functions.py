"""Evaluation functions against closed forms and a tiny random DiT."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from training.objective.frechet import frechet_distance
from training.objective.losses import denoising_loss_by_bin
from training.objective.sampling import sample


class ConstantModel(torch.nn.Module):
    """Predicts `value` everywhere and notes the calls it gets."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))
        self.timesteps: list[int] = []

    def forward(self, x, timestep, class_labels):
        self.timesteps += timestep.tolist()
        return type("Output", (), {"sample": torch.zeros_like(x) + self.value})


@pytest.fixture
def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        dropout=0.5,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def labelled(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 10


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 200) -> torch.Tensor:
    """Samples whose empirical mean and unbiased covariance are exactly the ones given."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    empirical = torch.linalg.cholesky(x.T @ x / (count - 1))
    white = torch.linalg.solve_triangular(empirical, x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_commuting_gaussians():
    # Commuting covariances: |mu_a - mu_b|^2 + sum over axes of (sd_a - sd_b)^2, in any basis.
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    mean_a, mean_b = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 4.0]], dtype=torch.float64)
    sd_a, sd_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 0.5]], dtype=torch.float64)
    a = gaussian(mean_a, basis @ sd_a.square().diag() @ basis.T)
    b = gaussian(mean_b, basis @ sd_b.square().diag() @ basis.T)
    assert frechet_distance(a, b) == pytest.approx((4 + 1) + (4 + 1 + 0), abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = C_a C_b.
    zero = torch.zeros(2, dtype=torch.float64)
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected)


def test_frechet_of_equal_sets_is_zero_even_when_singular():
    few = torch.randn(5, 64)  # rank 4 in 64 dimensions
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, few + 1) == pytest.approx(64, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), "at least 2 samples in features_a, found 1"),
        (torch.zeros(5, 4), torch.zeros(5, 3), "one width, found 4 and 3"),
        (torch.zeros(5, 4), torch.zeros(5), r"features_b as \(samples, F\)"),
        (torch.zeros(5, 4), torch.full((5, 4), torch.nan), "finite values in features_b"),
        (torch.full((5, 4), torch.inf), torch.zeros(5, 4), "finite values in features_a"),
    ],
)
def test_frechet_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_loss_of_a_constant_prediction_is_known(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    images, labels = torch.full((50, 1, 8, 8), 0.5), torch.zeros(50, dtype=torch.int64)
    loss = denoising_loss_by_bin(ConstantModel(1.0), scheduler, images, labels, bins=4, draws=20)
    assert loss.shape == (4,) and loss.dtype == torch.float64
    if kind == "sample":  # (1 - 0.5)^2
        torch.testing.assert_close(loss, torch.full((4,), 0.25, dtype=torch.float64))
        return
    if kind == "epsilon":  # E (1 - noise)^2
        expected = torch.full((4,), 2.0, dtype=torch.float64)
    else:  # v = alpha noise - sigma x: E (1 - v)^2 = (1 + sigma / 2)^2 + alpha^2
        alpha = scheduler.alphas_cumprod.double()
        expected = (1 + (1 - alpha).sqrt() / 2).square() + alpha
        expected = expected.view(4, 250).mean(1)
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0)


def test_every_image_sees_every_bin():
    model, (images, labels) = ConstantModel(0.0), labelled()
    denoising_loss_by_bin(model, DDIMScheduler(), images, labels, bins=10, draws=3)
    counts = torch.tensor(model.timesteps).div(100, rounding_mode="floor").bincount(minlength=10)
    assert counts.tolist() == [3 * len(images)] * 10


def test_loss_depends_on_the_seed_and_not_on_the_batch_size(tiny_dit):
    def loss(**options):
        return denoising_loss_by_bin(tiny_dit, DDIMScheduler(), *labelled(), **options)

    assert torch.equal(loss(seed=3), loss(seed=3))
    torch.testing.assert_close(loss(seed=3), loss(seed=3, batch_size=4))
    assert not torch.allclose(loss(seed=3), loss(seed=4), rtol=1e-3)


def test_evaluation_restores_each_modules_mode_and_ignores_global_state(tiny_dit):
    tiny_dit.train()
    tiny_dit.transformer_blocks[1].eval()  # a frozen part inside a training model
    before = {name: module.training for name, module in tiny_dit.named_modules()}
    state = torch.get_rng_state()
    first = denoising_loss_by_bin(tiny_dit, DDIMScheduler(), *labelled())
    drawn = sample(tiny_dit, DDIMScheduler(), torch.arange(3), seed=0, steps=2)
    assert {name: module.training for name, module in tiny_dit.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    tiny_dit.eval()  # neither dropout nor the DiT's label dropout took part
    assert torch.equal(first, denoising_loss_by_bin(tiny_dit, DDIMScheduler(), *labelled()))
    assert torch.equal(drawn, sample(tiny_dit, DDIMScheduler(), torch.arange(3), seed=0, steps=2))


def test_mode_is_restored_after_an_error(tiny_dit):
    tiny_dit.train()
    with pytest.raises(IndexError):  # a class the model does not know
        sample(tiny_dit, DDIMScheduler(), torch.tensor([99]), seed=0, steps=1)
    assert all(module.training for module in tiny_dit.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "1 to 1000 bins, found 0"),
        ({"draws": 0}, "draws and batch_size >= 1, found 0"),
    ],
)
def test_loss_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        denoising_loss_by_bin(ConstantModel(0.0), DDIMScheduler(), *labelled(), **options)


def test_loss_refuses_labels_that_do_not_fit():
    images, labels = labelled()
    with pytest.raises(ValueError, match=r"found \(6, 1, 8, 8\) and \(5,\)"):
        denoising_loss_by_bin(ConstantModel(0.0), DDIMScheduler(), images, labels[:5])


def test_samples_follow_seed_label_and_guidance(tiny_dit):
    def draw(labels=(0, 1, 2), seed=0, **options):
        return sample(
            tiny_dit, DDIMScheduler(), torch.tensor(labels), seed=seed, steps=3, **options
        )

    images = draw()
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and not images.requires_grad
    torch.testing.assert_close(draw(batch_size=2), images)  # noise does not depend on batching
    assert not torch.allclose(draw(seed=1), images)
    changed = draw(labels=(0, 1, 7))
    torch.testing.assert_close(changed[:2], images[:2])
    assert not torch.allclose(changed[2], images[2])
    # Weight 0 is the unconditional model: the label has no say.
    torch.testing.assert_close(draw(guidance_scale=0.0), draw(labels=(5, 5, 5), guidance_scale=0.0))
    torch.testing.assert_close(draw(guidance_scale=0.0), draw(labels=(10, 10, 10)))
    assert not torch.allclose(draw(guidance_scale=4.0), images)


def test_sampling_a_perfect_model_returns_its_image():
    # A model that knows the clean image: DDIM must arrive there from any noise.
    clean = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    class Oracle(torch.nn.Module):
        config = type("Config", (), {"in_channels": 1, "sample_size": 8})

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timestep, class_labels):
            return type("Output", (), {"sample": clean.expand_as(x)})

    scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    images = sample(Oracle(), scheduler, torch.zeros(2, dtype=torch.int64), seed=0, steps=10)
    torch.testing.assert_close(images, clean.expand(2, 1, 8, 8), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pass null_label"):
        sample(Oracle(), scheduler, torch.tensor([0]), seed=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"labels \(B,\)"):
        sample(Oracle(), scheduler, torch.zeros(2, 2, dtype=torch.int64), seed=0)
