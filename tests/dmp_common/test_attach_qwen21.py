"""Qwen-Image 2.1: reference pictures, and the keys and values that its pipeline keeps."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dmp_common import attach
from tests.dmp_common.attaching import watched
from tests.tiny import FAMILIES
from tests.tinymodel import noise

pytestmark = pytest.mark.skipif(
    "qwen-image-2.1" not in FAMILIES, reason="needs a diffusers that knows it"
)


def inputs(level: float, reference: bool = False) -> dict[str, Any]:
    """A call of a picture of 4 x 4 tokens, maybe with a reference of 2 x 4 inside its caption."""
    given = FAMILIES["qwen-image-2.1"].inputs(torch.tensor([level]), (4, 4), torch.float32, 1)
    if reference:
        given["hidden_states"] = torch.cat(
            [noise(5, torch.float32, 1, 8, 4), given["hidden_states"]], 1
        )
        given["img_shapes"] = [[(1, 2, 4), (1, 4, 4)]]
        given["img_mask"][:, 2:4] = True  # two slots of four tokens
    return given


def test_the_patch_acts_on_the_picture_and_not_on_the_reference():
    tiny = FAMILIES["qwen-image-2.1"]
    model, patch = tiny.model(), tiny.patch(sites=["block.0"])
    with watched(model, patch) as seen, torch.no_grad():
        model(**inputs(500.0, reference=True))
    added = seen.after["block.0"] - seen.before["block.0"]
    assert added.shape[1] == 3 + 8 + 16
    assert not added[:, :-16].any()
    assert (added[:, -16:].norm(dim=-1) > 0.01).all()


@pytest.mark.parametrize("reference", [False, True])
def test_what_is_kept_from_the_first_step_stays_right(reference: bool):
    """A patch that adds changes no keys and values of the text, at any timestep."""
    tiny = FAMILIES["qwen-image-2.1"]
    model, patch = tiny.model(), tiny.patch(sites="all")
    kept = diffusers.models.transformers.transformer_qwenimage21.QwenImage21KVCache(2)
    with attach(model, patch), torch.no_grad():
        model(**inputs(900.0, reference), kv_cache=kept, kv_cache_mode="extract")
        given = inputs(300.0, reference)
        fast = model(**given, kv_cache=kept, kv_cache_mode="cached").sample[:, -16:]
        slow = model(**given).sample[:, -16:]
    plain = model(**given).sample[:, -16:]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert (slow - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("reference", [False, True])
def test_with_a_modulating_patch_nothing_is_kept(reference: bool):
    """It changes keys and values of the text at each step: those of the first would be wrong."""
    tiny = FAMILIES["qwen-image-2.1"]
    model, patch = tiny.model(), tiny.patch(mix="modulate", sites="all")
    kept = diffusers.models.transformers.transformer_qwenimage21.QwenImage21KVCache(2)
    given = inputs(300.0, reference)
    with attach(model, patch) as attachment, torch.no_grad():
        model(**inputs(900.0, reference), kv_cache=kept, kv_cache_mode="extract")
        fast = model(**given, kv_cache=kept, kv_cache_mode="cached").sample
        assert torch.equal(fast, model(**given).sample)
        attachment.enabled = False
        plain = model(**given, kv_cache=kept, kv_cache_mode="cached").sample
    assert torch.equal(plain, model(**given).sample)
    assert (fast - plain).norm() > 0.01 * plain.norm()
