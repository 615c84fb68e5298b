"""Qwen-Image 2.1 in a single file, as ComfyUI names its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import tinyfiles
from tests.training.base.test_separate_files import config_of
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.frozen import find_base, load_frozen


@pytest.mark.skipif("qwen-image-2.1" not in TRAINED, reason="needs a diffusers that knows it")
def test_the_transformer_comes_from_a_file(folders: Folders, tmp_path: Path) -> None:
    """Gate and first layer of a feed-forward are one layer there."""
    folder = folders("qwen-image-2.1")
    model = tinyfiles.weights_of(folder / "transformer")
    weights = dict(model)
    for key in model:
        if key.endswith("gate_layer.weight"):
            first = key.replace("gate_layer", "proj")
            both = torch.cat([weights.pop(key), weights.pop(first)])
            weights[key.replace("gate_layer", "gate_up")] = both
    file = {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    path = tinyfiles.save(tmp_path / "model.safetensors", file)
    config = config_of("qwen-image-2.1", path, base_config=folder)
    frozen = load_frozen(config)
    found = frozen.model.state_dict()
    assert found.keys() == model.keys()
    assert all(torch.equal(found[key], value) for key, value in model.items())
    assert find_base(config.model_copy(update={"base": "auto"})) is frozen.base
