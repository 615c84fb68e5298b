"""Attaching a patch: models whose captions come from a language model, and their tokens."""

from __future__ import annotations

import diffusers
import pytest
import torch

from dmp_common import attach, detect_base
from dmp_common.detect import naming_of
from tests.dmp_common.attaching import make, plain_field, watched
from tests.tiny import FAMILIES, Tiny


def family(name: str) -> Tiny:
    if name not in FAMILIES:
        pytest.skip(f"diffusers {diffusers.__version__} does not know it")
    return FAMILIES[name]


@pytest.mark.parametrize("zero", [False, True], ids=["edit", "edit-2511"])
def test_references_of_qwen_edit_are_left_alone(zero):
    """Their tokens come after the picture's; Edit 2511 embeds timestep 0 for them besides."""
    tiny = family("qwen-image")
    model, patch = tiny.model(), make(tiny, sites="all")
    model.zero_cond_t = zero
    for block in model.transformer_blocks:
        block.zero_cond_t = zero
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    reference = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(4))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference], dim=1)
    inputs["img_shapes"] = [[(1, 4, 6), (1, 4, 4)]] * 2
    base = tiny.call(model, inputs)
    with watched(model, patch) as seen:
        output = tiny.call(model, inputs)
    assert not torch.equal(output[:, :24], base[:, :24])
    assert seen.e[0].shape[0] == (4 if zero else 2)
    for name in patch.sites:
        added = seen.after[name] - seen.before[name]
        expected = plain_field(patch, name, seen.e[0][:2], (4, 6)).flatten(2).transpose(1, 2)
        assert (added[:, :24] - expected).abs().max() < 2e-5
        assert not added[:, 24:].any()


def test_shapes_of_qwen_image_may_be_one_of_each_item():
    tiny = family("qwen-image")
    model, patch = tiny.model(), make(tiny)
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    with attach(model, patch):
        expected = tiny.call(model, inputs)
        assert torch.equal(tiny.call(model, inputs | {"img_shapes": [(1, 4, 6)] * 2}), expected)


def test_layered_qwen_image_is_no_model_of_the_base():
    """It makes several pictures in one sequence."""
    tiny = family("qwen-image")
    model = tiny.model()
    assert detect_base(model) is tiny.base
    model.time_text_embed.addition_t_embedding = torch.nn.Embedding(2, 32)
    assert naming_of(model, tiny.base) is None
