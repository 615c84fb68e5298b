"""Attaching a patch: videos, whose frames each get the field of a picture."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from dmp_common import PatchError, Schedule, Settings, attach
from dmp_common.attach.masking import MaskedContext
from dmp_common.attach.modulation import Part
from dmp_common.attach.runtime import runtime_of
from dmp_common.bases.base import Latent, ModelCall
from tests.dmp_common.attaching import close, make, plain_field, watched
from tests.tiny import FAMILIES

if "wan" not in FAMILIES:
    pytest.skip(f"diffusers {diffusers.__version__} does not know Wan", allow_module_level=True)
WAN = FAMILIES["wan"]
SIZE, TOKENS = (8, 12), 24  # of a frame


def video(frames: int, *times: float) -> dict[str, Tensor]:
    """A call with one timestep for each item, or for each token if each frame has its own.

    Args:
        times: the timesteps of both items, or of all frames of the first and then of the second.
    """
    inputs = WAN.inputs(torch.tensor(times[:2]), SIZE, torch.float32, 1)
    generator = torch.Generator().manual_seed(3)
    inputs["hidden_states"] = torch.randn(2, 4, frames, *SIZE, generator=generator)
    if len(times) > 2:
        own = torch.tensor(times).reshape(2, frames)
        inputs["timestep"] = own.repeat_interleave(TOKENS, dim=1)
    return inputs


def test_each_frame_gets_the_field_of_its_own_timestep():
    """The first frame of a video from a picture is clean, so its timestep is 0."""
    model, patch = WAN.model(), make(WAN, sites="all")
    times = (0.0, 900.0, 900.0, 0.0, 400.0, 400.0)
    for _ in range(2):  # the second call takes the fields from the cache
        with watched(model, patch, strength=0.5) as seen:
            WAN.call(model, video(3, *times))
        e = seen.e[0][:, ::TOKENS].flatten(0, 1)  # of each frame
        for name in patch.sites:
            added = seen.after[name] - seen.before[name]
            expected = plain_field(patch, name, e, (4, 6)).flatten(2).transpose(1, 2)
            assert close(added, 0.5 * expected.reshape(2, 3 * TOKENS, -1).float(), 1e-5)


@pytest.mark.parametrize("variant", [{}, {"mix": "modulate"}], ids=["add", "modulate"])
@pytest.mark.parametrize("frames", [1, 3])
def test_equal_timesteps_of_tokens_are_the_timestep_of_the_item(variant, frames):
    model, patch = WAN.model(), make(WAN, **variant)
    one = video(frames, 900.0, 100.0)
    each = video(frames, *[900.0] * frames, *[100.0] * frames)
    each["timestep"] = one["timestep"][:, None].expand(2, frames * TOKENS)
    settings = Settings(0.8, Schedule.from_percent(0.2, 1.0))
    for use in ({"strength": 0.8}, {"settings": settings}):
        with attach(model, patch, **use) as attachment:
            assert close(WAN.call(model, one), WAN.call(model, each), 1e-5)
            attachment.item_strengths = torch.tensor([1.0, 0.0])
            found = WAN.call(model, each)
            assert close(WAN.call(model, one), found, 1e-5)
        assert torch.equal(found[1], WAN.call(model, each)[1])  # the item of strength 0


def test_frames_outside_a_schedule_are_left_alone():
    model, patch = WAN.model(), make(WAN, sites="all")
    with watched(model, patch, schedule=Schedule(1000, 500)) as seen:
        WAN.call(model, video(2, 0.0, 900.0, 900.0, 900.0))
    added = (seen.after["block.0"] - seen.before["block.0"]).unflatten(1, (2, TOKENS))
    assert added[0, 1].all()
    assert added[1].all()
    assert not added[0, 0].any()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_outputs_are_modulated_by_frame_and_text_by_the_last(strength):
    patch = make(WAN, mix="modulate").requires_grad_(False)
    runtime, e = runtime_of(patch), torch.randn(4, 32)  # two items of two frames
    site = "block.0.ff.out"
    parts = (Part(site, 0),)

    def modulated(e: Tensor, x: Tensor, latent: Latent) -> Tensor:
        items = None if strength == 1.0 else torch.full((latent.batch,), strength)
        return runtime.prepare(e, latent, items=items).modulate(parts, x.clone())

    latent = Latent(2, SIZE, image_tokens=2 * TOKENS, frames=2)
    for length in (2 * TOKENS, 2, 5):  # tokens, an embedding for each frame, a caption
        x = torch.randn(2, length, 32)
        found = modulated(e, x, latent)
        pieces = x.flatten(0, 1).chunk(4) if length != 5 else x
        times = e if length != 5 else e[1::2]
        one = Latent(1, SIZE, image_tokens=TOKENS)
        expected = [
            modulated(time[None], piece.reshape(1, -1, 32), one)
            for time, piece in zip(times, pieces, strict=True)
        ]
        assert close(found, torch.cat(expected).reshape(x.shape), 1e-6)


def test_a_mask_lies_on_each_frame():
    patch = make(WAN).requires_grad_(False)
    latent = Latent(1, SIZE, image_tokens=2 * TOKENS, frames=2)
    whole = runtime_of(patch).prepare(torch.randn(1, 32), latent)
    mask, x = torch.zeros(1, 1, *SIZE), torch.randn(1, 2 * TOKENS, 32)
    mask[..., 6:] = 1.0
    changed, half = whole.add("block.0", x), MaskedContext(whole, mask, 2).add("block.0", x)
    shape = (2, 4, 6, 32)
    assert torch.equal(half.view(shape)[:, :, 3:], changed.view(shape)[:, :, 3:])
    assert torch.equal(half.view(shape)[:, :, :3], x.view(shape)[:, :, :3])


def test_calls_that_are_no_video_are_explained():
    x = torch.zeros(1, 4, 3, 7, 9)
    latent = WAN.base.latent["ldm"](WAN.base, ModelCall((x,), {}), torch.nn.Module())
    assert latent == Latent(1, (8, 10), image_tokens=60, frames=3)  # a host pads, diffusers drops
    latent = WAN.base.latent["diffusers"](WAN.base, ModelCall((x,), {}), torch.nn.Module())
    assert latent == Latent(1, (6, 8), image_tokens=36, frames=3)
    for args, kwargs, found in (
        ((x[:, :, 0],), {}, r"\(B, C, F, H, W\) .* found \(1, 4, 7, 9\)"),
        ((x,), {"time_dim_concat": x}, r"references \(time_dim_concat\)"),
        ((x,), {"context_latents": [x]}, r"references \(context_latents\)"),
    ):
        with pytest.raises(PatchError, match=found):
            WAN.base.latent["ldm"](WAN.base, ModelCall(args, kwargs), torch.nn.Module())
