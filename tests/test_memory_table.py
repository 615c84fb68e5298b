"""The table of what the weights of each base take in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from benchmarks.memory import PAGE, USUAL, Video, row_of, trained_bases, video_row
from dmp_common import get_base
from dmp_common.bases.wan import FRAME_STRIDE
from tests.tiny import FAMILIES
from training.base.families.table import family_of


def test_the_page_has_a_row_for_every_base_of_the_trainer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("<!-- table: memory -->")[2].partition("<!-- end of table -->")[0]
    rows = [line.split("|")[1].strip(" `") for line in table.splitlines() if line.startswith("| `")]
    assert rows == trained_bases(), "run python -m benchmarks.memory"


def test_every_base_of_videos_has_a_usual_one() -> None:
    videos = {name for name in trained_bases() if family_of(get_base(name)).frame_stride > 1}
    assert videos == set(USUAL)
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("<!-- table: memory of videos -->")[2].partition("<!-- end")[0]
    assert all(f"| `{name}` |" in table for name in videos), "run python -m benchmarks.memory"
    assert all(usual.frames % FRAME_STRIDE == 1 for usual in USUAL.values())


@pytest.mark.skipif("wan" not in FAMILIES, reason="needs a diffusers that knows it")
def test_a_row_of_videos_counts_the_inputs_of_blocks() -> None:
    """Two blocks of 32 channels in two bytes; a video of 9 frames has three of the latent."""
    tiny = FAMILIES["wan"]
    with torch.device("meta"):
        model = tiny.build()
        given = tiny.inputs(torch.zeros(1), (2, 2), torch.float32, 0)
    row = video_row(tiny.base, model, Video(9, (320, 160)), given, digits=9)
    assert row[:3] == ["`tiny-wan`", "9 frames, 320 x 160", "600"]
    video, picture = (float(cell.split()[0]) * 1e9 for cell in row[3:])
    inputs = 2 * 32 * 2  # of a token; what follows the last block keeps less than two blocks
    assert inputs * 400 < video - picture < 2.5 * inputs * 400
    assert inputs * 600 < video


def test_a_row_counts_bytes() -> None:
    """As counted here: linear layers have a byte a value, but for those that PixArt exempts.

    Two of three equal blocks are swapped, and one of them has room.
    """
    tiny = FAMILIES["pixart"]
    with torch.device("meta"):
        model = tiny.build()
    exempt = ("adaln_single", "proj_out")

    def count(part: nn.Module, within: str = "") -> tuple[int, int]:
        """The values of a part, and those of its layers in fp8."""
        linear = {
            name: module
            for name, module in part.named_modules(prefix=within)
            if isinstance(module, nn.Linear) and not name.startswith(exempt)
        }
        stored = sum(p.numel() for layer in linear.values() for p in layer.parameters())
        return sum(p.numel() for p in part.parameters()), stored

    values, in_fp8 = count(model)
    own, own_in_fp8 = count(model.transformer_blocks[0], "transformer_blocks.0")
    with torch.device("meta"):
        trained = sum(p.numel() for p in tiny.patch(None).parameters())
    whole, stored = 2 * values, 2 * values - in_fp8
    sizes = (whole, stored, stored - (2 * own - own_in_fp8))
    name, *found = row_of(tiny.base, model, digits=9)
    assert name == "`tiny-pixart`"
    assert [round(float(cell.split()[0]) * 1e9) for cell in found] == [values, *sizes, 16 * trained]
