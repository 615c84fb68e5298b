"""Training on one of the two experts of a pipeline (Wan 2.2 A14B)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dmp_common import Patch, PatchError
from tests.tiny import FAMILIES
from tests.training import tinyfiles
from tests.training.base.test_memory import config_of
from tests.training.conftest import Folders, Train
from training.base.frozen import base_kind, load_frozen

if "wan" not in FAMILIES:
    pytest.skip("this release of diffusers does not know Wan", allow_module_level=True)


@pytest.fixture
def pair(folders: Folders, tmp_path: Path) -> Path:
    """A pipeline with two experts."""
    folder = tmp_path / "pair"
    shutil.copytree(folders("wan"), folder)
    FAMILIES["wan"].model(5).save_pretrained(folder / "transformer_2")
    return folder


def test_the_expert_that_is_chosen_is_loaded(pair: Path, folders: Folders) -> None:
    low = load_frozen(config_of("wan", pair, expert="low"))
    high = load_frozen(config_of("wan", pair, expert="high"))
    assert tinyfiles.same(low.model, FAMILIES["wan"].model(5))
    assert tinyfiles.same(high.model, load_frozen(config_of("wan", folders("wan"))).model)
    assert not tinyfiles.same(high.model, low.model)
    for folder, expert, found in (
        (pair, {}, "expected --expert high or low for the two experts in .*, found none"),
        (folders("wan"), {"expert": "low"}, "expected a pipeline with transformer_2"),
    ):
        with pytest.raises(PatchError, match=found):
            base_kind(config_of("wan", folder, **expert))


@pytest.mark.parametrize(
    ("given", "timesteps"),
    [([], (0, 875)), (["--max_timestep", "800"], (0, 800))],
)
def test_an_expert_is_trained_at_its_own_timesteps(
    given: list[str], timesteps: tuple[int, int], pair: Path, train: Train
) -> None:
    place = ["--pretrained_model_name_or_path", str(pair)]
    out = train("wan", "--expert", "low", *place, *given)
    patch = Patch.load(next(out.glob("*.safetensors")))
    assert (patch.variant.expert, patch.variant.timesteps) == ("low", timesteps)
    assert all(torch.any(tensor) for tensor in patch.tensors().values())
