"""The bases: AnimateDiff's UNet, which has motion modules between the blocks of a Stable Diffusion.

Its frames are items of the batch at every site, all frames of one video after one another.
"""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Schedule, attach, detect_base
from tests.dmp_common.attaching import SD15, is_field, make, plain_field, watched
from tests.tiny import Tiny
from tests.tinymodel import noise

FRAMES = 3


def build() -> nn.Module:
    return diffusers.UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=(*("CrossAttnDownBlockMotion",) * 3, "DownBlockMotion"),
        up_block_types=("UpBlockMotion", *("CrossAttnUpBlockMotion",) * 3),
        cross_attention_dim=12,
        norm_num_groups=8,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    )


def inputs(t: Tensor, size: tuple[int, int], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    # Pipelines repeat the text for the frames, and give one timestep for all videos.
    return {
        "sample": noise(seed, dtype, len(t), 4, FRAMES, *size),
        "timestep": t,
        "encoder_hidden_states": noise(seed + 1, dtype, len(t) * FRAMES, 3, 12),
    }


MOTION = dataclasses.replace(SD15, name="motion", build=build, inputs=inputs)


def run(tiny: Tiny, model: nn.Module, timesteps: list[float]) -> Tensor:
    with torch.no_grad():
        return tiny.run(model, timesteps)


def test_it_is_a_model_of_its_base():
    assert detect_base(MOTION.model()) is SD15.base


@pytest.mark.parametrize("timesteps", [[500.0, 500.0], [10.0, 900.0]], ids=["equal", "different"])
def test_every_frame_gets_the_field_of_its_video(timesteps):
    """The resnets are called by keyword, with another keyword than the downsamplers."""
    model, patch = MOTION.model(), make(MOTION, sites="all")
    with watched(model, patch) as seen:
        run(MOTION, model, timesteps)
    for name, site in patch.sites.items():
        before, after = seen.before[name], seen.after[name]
        added, size = (after - before)[:, : site.width], tuple(before.shape[2:])
        expected = plain_field(patch, name, seen.e[0], size).repeat_interleave(FRAMES, dim=0)
        assert added.shape[0] == 2 * FRAMES
        assert is_field(added, before[:, : site.width], expected), name
        assert not (after - before)[:, site.width :].any()


def test_a_schedule_acts_on_the_frames_of_some_videos():
    model, patch = MOTION.model(), make(MOTION, sites="all")
    plain = run(MOTION, model, [10.0, 900.0])
    with attach(model, patch):
        full = run(MOTION, model, [10.0, 900.0])
    with attach(model, patch, schedule=Schedule(first=1000.0, last=500.0)):
        half = run(MOTION, model, [10.0, 900.0])
    assert torch.equal(half[0], plain[0])
    assert not torch.equal(full[0], plain[0])
    assert torch.allclose(half[1], full[1], atol=1e-5)
    assert torch.equal(run(MOTION, model, [10.0, 900.0]), plain)
