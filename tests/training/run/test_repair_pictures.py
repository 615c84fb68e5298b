"""The picture of a repair: which panels it has, and what they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from training.run.repair_pictures import in_red, on_paper, repair_picture


def drawn(patched: torch.Tensor, full: torch.Tensor, cheap: torch.Tensor) -> Image.Image:
    strip = torch.stack([cheap[0] + s * (full[0] - cheap[0]) for s in (0.0, 0.5, 1.0)])
    return repair_picture(
        full, cheap, patched, strip, cheap_name="in 3 bits", gone="90%", size="12 KB"
    )


def red(picture: Image.Image) -> float:
    """How much of the saturated red of differences there is."""
    pixels = np.asarray(picture).astype(int)
    return float(((pixels[..., 0] > 200) & (pixels[..., 1] < 120)).mean())


def test_colours_are_ink_on_paper_and_red_for_differences() -> None:
    ends = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert on_paper(ends)[:, :, 0, 0].tolist() == [[1, 1, 1], [0, 0, 0]]
    none, some, much = in_red(torch.tensor([0.0, -1.0, 3.0]).view(3, 1, 1, 1))[:, :, 0, 0]
    assert none.tolist() == [1, 1, 1]
    assert some.tolist() == much.tolist() == pytest.approx([0.85, 0, 0])


def test_panels_show_the_damage_and_its_repair() -> None:
    source = torch.Generator().manual_seed(0)
    full = torch.where(torch.rand(4, 1, 8, 8, generator=source) > 0.5, 1.0, -1.0)
    cheap = full + torch.randn(4, 1, 8, 8, generator=source)
    repaired, useless = drawn(full, full, cheap), drawn(cheap, full, cheap)
    assert repaired.size == useless.size
    assert red(useless) > 1.5 * red(repaired) > 0
    # Equal models are white in both rows of differences; what is left is the red of words.
    assert red(drawn(full, full, full)) < 0.01 * red(useless)
