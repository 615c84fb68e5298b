"""What a patch is for: the entry dmp.use, and the model that a repair patch was made for."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn

from dmp_common import Variant
from dmp_common.patch.serialize import use_of
from dmp_common.tools.inspect import as_text, inspect_file
from dmp_common.tools.use import cheap_types, described_use, unlike_cheap
from dmp_common.tools.weighttypes import weight_types
from tests.tiny import FAMILIES

TYPES = {"Q4_0": 980, "F16": 20}
USE = {
    "objective": "distill",
    "cheap": {"evaluations": 1, "quantization": "q4_0", "types": TYPES, "file": {"name": "a.gguf"}},
    "share_repaired": {"mean": 0.91, "low": 0.9, "high": 0.92},
}
METADATA = {"dmp.use": json.dumps(USE)}


@pytest.mark.parametrize(
    "found",
    [TYPES, {"Q4_0": 97, "F32": 2, "BF16": 1}, {"Q4_0": 980, "Q6_K": 15, "F16": 5}],
    ids=str,
)
def test_the_model_of_a_repair_patch_is_known(found):
    assert unlike_cheap(METADATA, found) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"BF16": 1000}, "BF16 (100%)"),
        ({"Q8_0": 980, "F16": 20}, "Q8_0 (98%)"),
        ({"Q4_0": 500, "Q6_K": 480, "F16": 20}, "Q4_0 (50%), Q6_K (48%)"),
        ({"F8_E4M3": 1000}, "F8_E4M3 (100%)"),
    ],
)
def test_another_model_is_named_with_what_was_expected(found, said):
    why = unlike_cheap(METADATA, found)
    assert f"weights in Q4_0 (98%), and this one has them in {said}" in why


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"cheap": 3}', '{"cheap": {"types": [1]}}'])
def test_entries_that_say_nothing_are_left_alone(text):
    assert cheap_types({"dmp.use": text}) == {}
    assert unlike_cheap({"dmp.use": text}, {"F16": 1}) is None
    assert described_use({"dmp.use": text}, Variant.create("sd15")) == []
    assert use_of({}) == {}


def test_inspect_says_what_a_patch_is_for(tmp_path):
    path = tmp_path / "p.safetensors"
    patch = FAMILIES["sd15"].patch(mix="modulate", guidance=4.5)
    patch.save(path, METADATA)
    record = inspect_file(path)
    assert record["use"] == USE
    text = as_text(record)
    for line in (
        "objective    distill",
        "repairs      a model with weights in Q4_0 (98%) (a.gguf)",
        "guidance     strength 1 stands for scale 4.5; use CFG 1",
        "repaired     91% of the held-out gap",
    ):
        assert line in text
    assert "dmp.use" not in text


def test_types_of_tensors_that_hosts_make():
    """Forge's GGUF parameters have a class of the package gguf, ComfyUI's wrap what they store."""
    model = nn.Linear(4, 2, bias=False)
    model.weight.gguf_cls = type("Q5_0", (), {})
    model.weight.real_shape = torch.Size([2, 4])
    assert weight_types(model) == {"Q5_0": 8}

    class Wrapping(torch.Tensor):
        _qdata = torch.zeros(2, 4, dtype=torch.float8_e4m3fn)

        def __tensor_flatten__(self):
            return ["_qdata"], {}

    other = nn.Module()
    other.register_parameter(
        "weight", nn.Parameter(torch.zeros(2, 4).as_subclass(Wrapping), requires_grad=False)
    )
    assert weight_types(other) == {"F8_E4M3": 8}
