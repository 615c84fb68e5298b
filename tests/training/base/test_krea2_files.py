"""Krea 2 in single files: the transformer in its original naming, and Qwen3-VL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tinykrea2 import original_name
from tests.training import tinyfiles
from tests.training.base.test_separate_files import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.frozen import find_base, load_frozen


def original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their original names; the tables of blocks are vectors there."""
    named = {original_name(key): value for key, value in weights.items()}
    return {k: v.flatten() if k.endswith(".mod.lin") else v for k, v in named.items()}


@pytest.mark.skipif("krea2" not in TRAINED, reason="needs a diffusers that knows it")
@pytest.mark.parametrize("whole", [True, False], ids=["one file", "two files"])
def test_parts_come_from_files(whole: bool, folders: Folders, tmp_path: Path) -> None:
    """A checkpoint with both, as ComfyUI saves it; or each in a file of its own."""
    folder = folders("krea2")
    model, encoder = (tinyfiles.weights_of(folder / p) for p in ("transformer", "text_encoder"))
    encoder = {key: value + 0.5 for key, value in encoder.items()}  # no others are read
    weights = original(model)
    text = {f"model.{key}": value for key, value in encoder.items()}
    path, given = tmp_path / "model.safetensors", {}
    if whole:
        weights = {f"model.diffusion_model.{name}": value for name, value in weights.items()}
        prefix = "text_encoders.qwen3vl_4b.transformer."
        weights |= {prefix + name: value for name, value in text.items()}
    else:
        given["text_encoder"] = tinyfiles.save(tmp_path / "text.safetensors", text)
    tinyfiles.save(path, weights)
    config = config_of("krea2", path, base_config=folder, **given)
    frozen = load_frozen(config)
    for part, expected in ((frozen.model, model), (frozen.encoders["text_encoder"], encoder)):
        found = part.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert find_base(config.model_copy(update={"base": "auto"})) is frozen.base
