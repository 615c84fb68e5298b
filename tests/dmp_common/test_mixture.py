"""Our own variants: gates of whole grids, residual gates, and their beginning with stages."""

import pytest
import torch

from dmp_common import Patch, PatchError
from dmp_common.patch.variant import Variant
from tests.randomness import randomise

MIXTURE = {"grids": 3, "gate_unit": "grid", "gate_form": "residual", "grid": 4}


def _embedding(count=200, width=64):
    """Like a model's: sines of the timestep at many frequencies."""
    t = torch.linspace(0, 1, count)[:, None]
    angles = t * torch.logspace(0, 2, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def test_a_residual_gate_is_one_plus_its_logit_and_a_field_a_mixture_of_grids():
    patch = Patch.create("digits", **MIXTURE, gate_init="random")
    randomise(patch, 0)
    e = torch.randn(2, 64)
    patch.eval()
    weights = patch.gate_weights(e)
    logits = patch.gate_logits(e)
    assert logits.shape == (2, 6, 3) and weights.shape == (2, 6, 48)
    by_grid = weights.reshape(2, 6, 3, 16)
    torch.testing.assert_close(by_grid, (1 + logits)[..., None].expand_as(by_grid))
    x = torch.zeros(2, 16, 64)
    context = patch.prepare(e, (8, 8))
    prompts = patch.pool("block.2").prompts
    wanted = torch.einsum("tk,knd->tnd", 1 + logits[:, 2], prompts)
    torch.testing.assert_close(context.add("block.2", x), wanted, atol=1e-4, rtol=1e-5)


def test_grids_of_a_softmax_share_one_weight():
    patch = Patch.create("digits", grids=3, gate_unit="grid", gate_init="random", grid=4)
    weights = patch.gate_weights(torch.randn(5, 64)).reshape(5, 6, 3, 16)
    assert (weights == weights[..., :1]).all() and weights.std() > 0
    torch.testing.assert_close(weights[..., 0].sum(-1), torch.ones(5, 6))


def test_a_residual_weight_of_each_prompt():
    patch = Patch.create("digits", gate_form="residual")
    e = torch.randn(3, 64)
    assert (patch.gate_weights(e) == 1).all()  # zero gate: prompt tuning
    randomise(patch, 1)
    weights = patch.gate_weights(e)
    torch.testing.assert_close(weights, 1 + patch.gate_logits(e))
    assert weights.min() < 0


def test_stages_give_each_grid_a_part_of_the_schedule():
    patch = Patch.create("digits", **MIXTURE)
    assert patch.variant.gate_init == "stages"
    e = _embedding()
    patch.gate.begin_with_stages(e)
    by_grid = patch.gate_weights(e)[:, 0].reshape(200, 3, 16)[:, :, 0]
    places = torch.linspace(0, 1, 200)[:, None]
    wanted = (1 - 2 * (places - torch.tensor([0.0, 0.5, 1.0])).abs()).clamp(min=0)
    assert (by_grid - wanted).abs().max() < 0.15
    assert patch.gate.weight.norm() < 50 and (patch.gate.weight[:, -1] == 0).all()
    alone = Patch.create("digits", **(MIXTURE | {"grids": 1}))
    alone.gate.begin_with_stages(e)
    torch.testing.assert_close(alone.gate_weights(e), torch.ones(200, 6, 16))


def test_stages_of_a_part_of_the_schedule_share_that_part():
    patch = Patch.create("digits", **MIXTURE, timesteps=(200, 600))
    e = _embedding(1000)
    patch.gate.begin_with_stages(e)
    by_grid = patch.gate_weights(e)[:, 0].reshape(1000, 3, 16)[:, :, 0]
    places = torch.linspace(0, 1000, 1000)[:, None]
    wanted = (1 - 2 * (places - torch.tensor([200.0, 400.0, 600.0])).abs() / 400).clamp(min=0)
    assert (by_grid - wanted)[200:600].abs().max() < 0.2


def test_a_mixture_has_as_many_prompts_as_one_grid():
    paper = Patch.create("sd15")
    mixture = Patch.create("sd15", grids=4, gate_unit="grid", gate_form="residual")
    assert mixture.variant.grid == (8, 8) and mixture.variant.count == paper.variant.count
    assert mixture.saved_parameters < paper.saved_parameters
    assert Patch.create("sd15", grids=2, gate_unit="grid").variant.grid == (11, 11)
    assert Patch.create("sd15", grids=4).variant.grid == (16, 16)


def test_the_mean_weight_is_one_after_scaling_for_learning():
    softmax = Patch.create("digits", grids=4, gate_unit="grid", gate_init="random")
    softmax.scale_for_learning()
    assert softmax.learning_scale == 4
    residual = Patch.create("digits", **MIXTURE)
    residual.scale_for_learning()
    assert residual.learning_scale == 1


def test_the_file_says_which_variant_and_gives_it_back(tmp_path):
    patch = Patch.create("digits", **MIXTURE)
    randomise(patch, 2)
    patch.save(tmp_path / "p.safetensors")
    again = Patch.load(tmp_path / "p.safetensors")
    assert again.variant == patch.variant
    e = torch.randn(2, 64)
    assert torch.equal(again.gate_weights(e), patch.gate_weights(e))


def test_the_papers_file_says_nothing_of_it_and_older_files_are_read():
    record = Patch.create("digits").variant.to_json()
    assert not {"gate_unit", "gate_form", "timesteps"} & set(record)
    variant = Variant.from_json(record)
    assert (variant.gate_unit, variant.gate_form) == ("prompt", "softmax")
    assert variant.timesteps == (0, 1000)
    with pytest.raises(PatchError, match="gate_form"):
        Variant.from_json({**record, "gate_form": "tanh"})


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"gate_form": "residual", "gate": "none"}, "gate none"),
        ({"timesteps": (500, 400)}, "found 500 to 400"),
        ({"timesteps": (0, 1001)}, "found 0 to 1001"),
        ({"timesteps": [0.0, 500.0]}, "timesteps as first and last"),
        ({"timesteps": 500}, "timesteps as first and last, found 500"),
        ({"gate_form": "residual", "selection": "hard"}, "selection hard"),
        ({"gate_unit": "grid", "grids": 2, "selection": "hard"}, "selection hard"),
        ({"gate_init": "stages"}, "unit prompt"),
        (MIXTURE | {"gate": "attention", "gate_init": "stages"}, "gate attention"),
        (MIXTURE | {"condition": "t+y", "gate_init": "stages"}, "condition t\\+y"),
    ],
)
def test_what_does_not_fit_is_told(options, found):
    with pytest.raises(PatchError, match=found):
        Patch.create("digits", **options)
