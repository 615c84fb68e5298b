"""Patches for one of the two experts of a pipeline (Wan 2.2 A14B)."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from dmp_common import Patch, PatchError, attach, attached, detach
from dmp_common.attach.experts import on_other_expert
from dmp_common.tools.inspect import as_text, inspect_file
from tests.tiny import FAMILIES

if "wan" not in FAMILIES:
    pytest.skip(f"diffusers {diffusers.__version__} does not know Wan", allow_module_level=True)
WAN = FAMILIES["wan"]


def pipeline(**parts: object) -> SimpleNamespace:
    """The two experts as a pipeline of diffusers has them."""
    return SimpleNamespace(**{"transformer": WAN.model(1), "transformer_2": WAN.model(2), **parts})


def test_a_patch_goes_on_its_own_expert():
    pipe = pipeline()
    plain = [WAN.run(model) for model in (pipe.transformer, pipe.transformer_2)]
    attach(pipe, WAN.patch(expert="low"))
    assert torch.equal(WAN.run(pipe.transformer), plain[0])
    assert not torch.equal(WAN.run(pipe.transformer_2, [10.0, 800.0]), plain[1])
    attach(pipe, WAN.patch(expert="high"))
    assert len(attached(pipe)) == 2
    assert not torch.equal(WAN.run(pipe.transformer, [900.0, 950.0]), plain[0])
    assert detach(pipe) == 2
    found = [WAN.run(model) for model in (pipe.transformer, pipe.transformer_2)]
    assert all(map(torch.equal, found, plain))


def test_a_pipeline_and_a_patch_must_agree_on_the_expert():
    with pytest.raises(PatchError, match=r"for which of the pipeline's two experts .*`transformer"):
        attach(pipeline(), WAN.patch())
    with pytest.raises(PatchError, match="expert for high noise in `transformer`, found none"):
        attach(pipeline(transformer=None), WAN.patch(expert="high"))
    attach(pipeline(transformer_2=None), WAN.patch())  # Wan 2.1


def test_timesteps_of_the_other_expert_are_warned_of_once():
    model = WAN.model()
    for expert, right, wrong in (("low", 900.0, 990.0), ("high", 500.0, 300.0)):
        with attach(model, WAN.patch(expert=expert)), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            WAN.run(model, [0.0, right])  # 0 is a clean frame's
            assert not said
            for _ in range(2):
                WAN.run(model, [0.0, wrong])
        text = f"for {expert} noise, which takes timesteps .* 875, and this model is called with"
        assert [warning.category for warning in said] == [UserWarning]
        with pytest.raises(UserWarning, match=text):
            warnings.warn(said[0].message, stacklevel=1)
    assert on_other_expert(WAN.patch().variant, 1000.0) is None


def test_the_file_says_for_which_expert_it_is(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    WAN.patch(expert="high").save(path)
    assert Patch.load(path).variant.expert == "high"
    text = as_text(inspect_file(path))
    assert "expert       the model for high noise of the pair" in text
    WAN.patch().save(path)
    assert "expert" not in Patch.load(path).variant.to_json()
    for name, expert, found in (("wan", "middle", "high or low"), ("flux", "high", "are whole")):
        with pytest.raises(PatchError, match=f"{found}, found '{expert}': correct it"):
            FAMILIES[name].patch(expert=expert)
