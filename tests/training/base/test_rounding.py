"""Weights rounded to a few levels: what the levels are, and the correction of biases."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from tests.tiny import FAMILIES
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders
from training.base.cheap import cheap_base
from training.base.frozen import load_frozen
from training.base.layers import linear_layers
from training.base.rounding import correct_biases, round_groups, round_rows


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rows_have_few_levels_around_zero(bits: int) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rounded = round_rows(weight, bits)
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((weight - rounded).abs() <= 0.5001 * step).all())
    for row in rounded:
        assert len(row.unique()) <= 2**bits - 1
    assert torch.allclose(rounded.abs().amax(1), weight.abs().amax(1))
    assert torch.equal(rounded[3], weight[3])


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_groups_have_levels_between_their_extremes(bits: int) -> None:
    """Also the last group, which is shorter, and one whose values are all equal."""
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)) + 3
    weight[2, :32] = 0.3
    rounded = round_groups(weight, bits)
    for group, of_group in zip(weight.split(32, 1), rounded.split(32, 1), strict=True):
        step = (group.amax(1, keepdim=True) - group.amin(1, keepdim=True)) / (2**bits - 1)
        assert bool(((group - of_group).abs() <= 0.5 * step + 1e-6).all())
        assert all(len(row.unique()) <= 2**bits for row in of_group)
    assert torch.equal(rounded[2, :32], weight[2, :32])


def test_half_precision_stays_half_precision() -> None:
    weight = torch.randn(4, 40).bfloat16()
    assert round_rows(weight, 3).dtype == round_groups(weight, 3).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["dit", "sd15"])
def test_corrected_biases_bring_the_mean_output_back(name: str, folders: Folders) -> None:
    """On the given inputs the mean error of the first layer is zero, with or without a bias."""
    config = config_of(name, folders(name), student_quantization="rtn2")
    exact = load_frozen(config)
    cheap = cheap_base(exact, config)
    inputs = FAMILIES[name].inputs(torch.tensor([3.0, 500.0]), (8, 8), torch.float32, 0)
    noisy = inputs["hidden_states" if name == "dit" else "sample"]
    given = (
        {"labels": inputs["class_labels"]}
        if name == "dit"
        else {"prompt": inputs["encoder_hidden_states"]}
    )
    before = {key: value.clone() for key, value in exact.model.state_dict().items()}
    correct_biases(cheap, exact, [(noisy, inputs["timestep"], given)])
    layers, rounded = linear_layers(exact.model), linear_layers(cheap.model)
    assert sum(layer.bias is None for layer in layers.values()) == (0 if name == "dit" else 60)
    assert all(layer.bias is not None for layer in rounded.values())

    seen: dict[str, torch.Tensor] = {}

    def watch(key: str) -> nn.Module:
        def hook(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen[key] = given[0].detach().flatten(0, -2)

        return hook

    for key, layer in layers.items():
        layer.register_forward_pre_hook(watch(key))
    exact.family.predict(exact.model, noisy, inputs["timestep"], given)
    for key, x in seen.items():
        error = layers[key](x) - rounded[key](x)
        assert float(error.mean(0).abs().max()) < 1e-5 < float(error.abs().max()), key
    assert all(torch.equal(before[key], value) for key, value in exact.model.state_dict().items())
