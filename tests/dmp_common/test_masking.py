"""A mask limits what a patch does to a part of the picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError
from dmp_common.attach.context import Context
from dmp_common.attach.masking import MaskedContext
from dmp_common.attach.modulation import Part
from dmp_common.attach.runtime import runtime_of
from dmp_common.bases.base import Latent
from tests.tiny import FAMILIES


def context(name: str, latent: Latent, mix: str = "add") -> Context:
    patch = FAMILIES[name].patch(mix=mix).eval().requires_grad_(False)
    e = torch.randn(1, patch.base.embedding).expand(latent.batch, -1)
    return runtime_of(patch).prepare(e, latent)


def left(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1.0
    return mask


def test_tokens_of_the_picture_among_text():
    """Flux's single blocks see the text first; it is changed by the share of the mask."""
    whole = context("flux", Latent(2, (8, 8), image_tokens=16), "modulate")
    site = next(name for name in whole.sites if name.startswith("single"))
    width = whole.sites[site].width
    x, parts = torch.randn(2, 5 + 16, width), (Part(site, 0),)
    changed = whole.modulate(parts, x.clone())
    half = MaskedContext(whole, left(8, 8), 2).modulate(parts, x.clone())
    picture = half[:, 5:].reshape(2, 4, 4, -1)
    assert torch.equal(picture[:, :, :2], changed[:, 5:].reshape(2, 4, 4, -1)[:, :, :2])
    assert torch.equal(picture[:, :, 2:], x[:, 5:].reshape(2, 4, 4, -1)[:, :, 2:])
    torch.testing.assert_close(half[:, :5], (x + changed)[:, :5] / 2)


def test_text_of_the_pictures_length_is_not_the_picture():
    whole = context("flux", Latent(1, (8, 8), image_tokens=16), "modulate")
    site = next(name for name in whole.sites if ".text." in name and "mod" not in name)
    x, parts = torch.randn(1, 16, whole.sites[site].width), (Part(site, 0),)
    changed = whole.modulate(parts, x.clone())
    half = MaskedContext(whole, left(8, 8), 2).modulate(parts, x.clone())
    torch.testing.assert_close(half, (x + changed) / 2)


def test_soft_masks_scale_the_field_and_keep_the_layout():
    whole = context("sd15", Latent(2, (8, 8)))
    site = next(iter(whole.columns))
    x = torch.randn(2, whole.sites[site].width, 8, 8).to(memory_format=torch.channels_last)
    soft = MaskedContext(whole, torch.full((1, 1, 16, 16), 0.25), None).add(site, x)
    torch.testing.assert_close(soft - x, (whole.add(site, x) - x) * 0.25)
    assert soft.stride() == x.stride()
    assert MaskedContext(whole, left(8, 8), None).add("nowhere", x) is x


def test_masks_must_fit_the_batch():
    whole = context("sd15", Latent(3, (8, 8)))
    site = next(iter(whole.columns))
    x = torch.randn(3, whole.sites[site].width, 8, 8)
    masks = left(8, 8).expand(2, -1, -1, -1)
    with pytest.raises(PatchError, match="batch of 2 pictures, as many as masks, found 3"):
        MaskedContext(whole, masks, None).add(site, x)
