"""Bytes of models in few bits, against what files of that type take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.base.cheap import cheap_base
from training.base.frozen import FrozenBase, load_frozen
from training.base.layers import linear_layers
from training.base.stored_size import stored_size
from training.options.command_line import resolve
from training.options.config import TrainConfig


@pytest.fixture(scope="module")
def digits() -> FrozenBase:
    return load_frozen(resolve({"base": "digits"}))


def config(quantization: str | None) -> TrainConfig:
    return TrainConfig(base="digits", student_quantization=quantization)


def test_every_form_counts_its_scales(digits: FrozenBase) -> None:
    total = sum(parameter.numel() for parameter in digits.model.parameters())
    layers = linear_layers(digits.model).values()
    few = sum(layer.weight.numel() for layer in layers)
    rows = sum(len(layer.weight) for layer in layers)
    assert stored_size(digits.model, config(None)) == 2 * total
    rest = 2 * (total - few)
    # 4 bits, with a scale and a minimum of 16 bits for 32 values: 5 bits a value.
    assert stored_size(digits.model, config("rtn4-group32")) == rest + few * 5 // 8
    assert stored_size(digits.model, config("rtn4")) == rest + few // 2 + 2 * rows
    scaled = config("fp8-scaled")
    assert stored_size(cheap_base(digits, scaled).model, scaled) == rest + few
    pytest.importorskip("gguf")
    # The types of GGUF are stored for real; q4_1 has what rtn4-group32 has.
    for kind, bits in (("q4_1", 5), ("q4_0", 4.5), ("q8_0", 8.5)):
        asked = config(kind)
        cheap = cheap_base(digits, asked)
        assert stored_size(cheap.model, asked) == rest + few * bits / 8


def test_a_file_counts_what_it_stores(tmp_path: Path, digits: FrozenBase) -> None:
    weights = {n: t.half().contiguous() for n, t in digits.model.state_dict().items()}
    few = 0
    for name in linear_layers(digits.model):
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
        few += weight.numel()
    path = tmp_path / "student.safetensors"
    save_file(weights, path)
    total = sum(tensor.numel() for tensor in weights.values())
    asked = TrainConfig(base="digits", student_weights=str(path))
    assert stored_size(digits.model, asked) == 2 * total - few
