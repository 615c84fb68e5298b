"""Attaching a patch: text and reference tokens."""

from __future__ import annotations

import pytest
import torch

from tests.dmp_common.attaching import FLUX, make, plain_field, watched
from tests.tiny import FAMILIES


def test_kontext_reference_tokens_are_left_alone():
    """FLUX Kontext appends the tokens of a reference picture, whose first position id is 1."""
    tiny, model, patch = FLUX, FLUX.model(), make(FLUX, sites="all")
    inputs = tiny.inputs(torch.tensor([10.0, 900.0]), (8, 12), torch.float32, 1)
    own = inputs["hidden_states"].shape[1]
    assert own == 24
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(2, 16, 16, generator=generator)
    ids = tiny.inputs(torch.tensor([1.0]), (8, 8), torch.float32, 1)["img_ids"].clone()
    ids[:, 0] = 1
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    base = model(**inputs, return_dict=False)[0]
    with watched(model, patch) as seen:
        output = model(**inputs, return_dict=False)[0]
    assert not torch.equal(output[:, :own], base[:, :own])
    for name in patch.sites:
        added = (seen.after[name] - seen.before[name])[:, -(own + 16) :]
        expected = plain_field(patch, name, seen.e[0], (4, 6)).flatten(2).transpose(1, 2)
        assert (added[:, :own] - expected).abs().max() < 2e-5
        assert not added[:, own:].any()
        text = (seen.after[name] - seen.before[name])[:, : -(own + 16)]
        assert not text.any()


@pytest.mark.parametrize("references", [0, 9])
def test_text_before_the_image_tokens_is_left_alone(references):
    """ComfyUI's single blocks get [text; image; references] in one sequence."""
    patch = make(FLUX, sites="all")
    e = torch.randn(2, FLUX.base.embedding)
    tokens = 24 + references if references else None
    context = patch.prepare(e, (8, 12), image_tokens=tokens)
    for name in patch.sites:
        for text in (0, 5):
            x = torch.randn(2, text + 24 + references, 32)
            added = context.add(name, x) - x
            expected = plain_field(patch, name, e, (4, 6)).flatten(2).transpose(1, 2)
            assert not added[:, :text].any()
            assert (added[:, text : text + 24] - expected).abs().max() < 2e-5
            assert not added[:, text + 24 :].any()


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd35", "dit"])
@pytest.mark.parametrize("padded", [False, True])
def test_incomplete_tokens_at_the_edge(name, padded):
    """An odd latent: diffusers drops the incomplete token, ComfyUI pads it to a whole one."""
    tiny = FAMILIES[name]
    patch = make(tiny)
    site = next(iter(patch.sites))
    e = torch.randn(1, tiny.base.embedding)
    for latent in ((9, 8), (8, 11), (9, 13)):
        grid = tuple((side + padded) // 2 for side in latent)
        x = torch.zeros(1, grid[0] * grid[1], 32)
        added = patch.prepare(e, latent).add(site, x)
        expected = plain_field(patch, site, e, grid).flatten(2).transpose(1, 2)
        assert (added - expected).abs().max() < 2e-5


@pytest.mark.parametrize("text", [0, 5])
def test_incomplete_tokens_at_the_edge_of_flux(text):
    """ComfyUI pads an odd latent: 9 x 8 gives 5 x 4 tokens."""
    patch = make(FLUX)
    e = torch.randn(1, FLUX.base.embedding)
    expected = plain_field(patch, "single.0", e, (5, 4)).flatten(2).transpose(1, 2)
    for image_tokens, references in ((20, 0), (None, 0), (29, 9)):
        x = torch.zeros(1, text + 20 + references, 32)
        added = patch.prepare(e, (9, 8), image_tokens=image_tokens).add("single.0", x)
        assert not added[:, :text].any()
        assert (added[:, text : text + 20] - expected).abs().max() < 2e-5
        assert not added[:, text + 20 :].any()
