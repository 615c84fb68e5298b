"""Masks and keyframes in ComfyUI's real models, as its samplers call them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

SIGMAS = {"sd15": 2.0, "sdxl": 2.0, "pixart": 2.0}  # others run from 1 to 0


def left_half(height: int = 128, width: int = 64) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, :, : width // 2] = 1.0
    return mask


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_white_is_the_patch_and_black_is_the_plain_model(family, run, host, mix):
    plain, patch = family.comfy(), family.patch(mix=mix, std=0.2)
    sigmas = torch.full((2,), SIGMAS.get(family.name, 0.5))

    def out(mask: Tensor | None) -> Tensor:
        return run.call(host.attach(plain, run.record(patch, mask=mask)), family, sigmas)

    alone, whole = run.call(plain, family, sigmas), out(None)
    assert torch.equal(out(torch.zeros(1, 64, 64)), alone)
    assert torch.equal(out(torch.ones(1, 64, 64)), whole)
    half = out(left_half())
    assert not torch.allclose(half, alone)
    assert not torch.allclose(half, whole)
    each = out(torch.stack([torch.zeros(64, 64), torch.ones(64, 64)]))  # one for each item
    torch.testing.assert_close(each, torch.cat([alone[:1], whole[1:]]), rtol=1e-4, atol=1e-4)


def test_only_the_masked_part_of_a_sites_input_changes(real, run):
    from dmp_common.attach.masking import MaskedContext
    from dmp_common.bases.base import Latent

    family = real.FAMILIES["sd15"]
    record = run.record(family.patch(sites="all"))
    e = torch.randn(2, record.loaded.patch.base.embedding)
    context = record.loaded.runtime.prepare(e, Latent(2, (16, 8)))
    mask = left_half(16, 8)[:, None]
    x = torch.randn(2, context.sites["in.1"].width, 16, 8)
    whole, half = context.add("in.1", x), MaskedContext(context, mask, None).add("in.1", x)
    assert torch.equal(half[..., :4], whole[..., :4])
    assert torch.equal(half[..., 4:], x[..., 4:])
    assert not torch.equal(whole[..., 4:], x[..., 4:])


@pytest.mark.parametrize("name", ["sd15", "flux", "qwen-image"])
def test_areas_get_their_part_of_the_mask(real, run, host, name, monkeypatch):
    """A condition for the right half sees the right half of the mask, which is black here."""
    family, seen = real.FAMILIES[name], []
    masks = importlib.import_module("comfyui_dmp.masks")
    taken = masks.MaskOfCalls.taken

    def spy(self: Any, conds: dict[str, Any], x: Tensor) -> Tensor:
        mask = taken(self, conds, x)
        seen.append((tuple(x.shape[-2:]), mask))
        return mask

    monkeypatch.setattr(masks.MaskOfCalls, "taken", spy)
    plain = family.comfy()
    record = run.record(family.patch(std=0.2), mask=left_half())
    area = {"area": (8, 4, 0, 4)} if not family.frames else {"area": (1, 8, 4, 0, 0, 4)}
    run.sample(host.attach(plain, record), family, steps=1, count=2, size=(8, 8), **area)
    halves = [mask for size, mask in seen if size == (8, 4)]
    wholes = [mask for size, mask in seen if size == (8, 8)]
    assert halves
    assert wholes
    assert all(not mask.any() for mask in halves)
    for mask in wholes:
        assert mask.shape[2:] == (8, 8)
        assert len(mask) in (1, 2, 4)
        assert torch.equal(mask[..., :4], torch.ones_like(mask[..., :4]))
        assert not mask[..., 4:].any()


@pytest.mark.parametrize("mix", ["add", "modulate"])
def test_a_batch_with_masks_equals_single_samplings(real, run, host, mix):
    family = real.FAMILIES["sd15"]
    plain, patch = family.comfy(), family.patch(mix=mix, std=0.2)
    each = torch.cat([left_half(), 1.0 - left_half()])

    def sampled(mask: Tensor) -> Tensor:
        return run.sample(host.attach(plain, run.record(patch, mask=mask)), family, count=2)

    both = sampled(each)
    for item in range(2):
        alone = sampled(each[item : item + 1])
        torch.testing.assert_close(both[item], alone[item], rtol=1e-4, atol=1e-4)


def test_two_masked_patches_do_not_meet(real, run, host):
    """Each has its own half; the second's whole mask of zeros changes nothing."""
    family = real.FAMILIES["sd15"]
    one = host.attach(family.comfy(), run.record(family.patch(1), mask=left_half()))
    off = host.attach(one, run.record(family.patch(2), mask=torch.zeros(1, 8, 8)))
    assert torch.equal(run.sample(off, family), run.sample(one, family))
    both = host.attach(one, run.record(family.patch(2), mask=1.0 - left_half()))
    assert not torch.allclose(run.sample(both, family), run.sample(one, family))


def test_keyframes_and_strengths_of_sites(real, run, host):
    family = real.FAMILIES["sd15"]
    plain, patch = family.comfy(), family.patch(sites="all", std=0.2)
    sigmas = torch.tensor([2.0])

    def out(**settings: Any) -> Tensor:
        return run.call(host.attach(plain, run.record(patch, **settings)), family, sigmas)

    assert torch.equal(out(keyframes=((0.0, 0.5), (1.0, 0.5))), out(strength=0.5))
    assert torch.equal(
        out(keyframes=((0.0, 1.0), (0.5, 0.3), (1.0, 0.3))), out(curve=(1.0, 0.3, 0.3))
    )
    names = list(patch.sites)
    rest = tuple((name, 0.0) for name in names[1:])
    assert torch.equal(out(site_strengths=rest), out(sites=frozenset(names[:1])))
    halves = tuple((name, 0.5) for name in names)
    torch.testing.assert_close(out(site_strengths=halves), out(strength=0.5))
