"""Pictures for people: enlarged, labelled, side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.objective.pictures import comparison


def pixels(base: torch.Tensor, patched: torch.Tensor, prompt: str = "") -> np.ndarray:
    return np.asarray(comparison(base, patched, prompt)).astype(int)


def middles(array: np.ndarray) -> list[list[int]]:
    """The colour in the middle of each of the three panels."""
    row, width = 22 + 4 + 128, (array.shape[1] - 8) // 3
    return [array[row, 8 + number * width + 128].tolist() for number in range(3)]


def test_three_panels_show_base_patched_and_the_amplified_difference() -> None:
    base, patched = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.1)
    patched[2] = -0.1
    array = pixels(base, patched)
    left, middle, right = middles(array)
    assert left == [128, 128, 128] and middle == [140, 140, 115]
    assert right == pytest.approx([230, 230, 25.5], abs=1)  # 0.1 x 8
    assert array.shape[1] >= 3 * 256  # 8 pixels a side are enlarged


@pytest.mark.parametrize("size", [(3, 300, 260), (1, 8, 8)])
def test_equal_pictures_have_a_grey_difference(size: tuple[int, int, int]) -> None:
    picture = torch.linspace(-1, 1, size[0] * size[1] * size[2]).reshape(size)
    assert middles(pixels(picture, picture))[2] == [128, 128, 128]


def test_one_bright_pixel_does_not_hide_the_rest() -> None:
    base = torch.zeros(1, 16, 16)
    patched = torch.full((1, 16, 16), 0.02)
    patched[0, 0, 0] = 1.0
    assert middles(pixels(base, patched))[2][0] > 200  # 0.02 x 32


def test_prompt_is_wrapped_below_and_a_long_one_is_cut_off() -> None:
    base = torch.zeros(3, 256, 256)
    heights = [
        pixels(base, base, prompt).shape[0]
        for prompt in ("", "a cat", "a cat on a mat, " * 12, "x" * 2000, "tag, " * 3000)
    ]
    without, one, several, word, many = heights
    assert without < one < several < word <= many
    assert word == many < one + 200
    below = pixels(base, base, "a cat")[without - 8 :]
    assert below.min() < 60  # there is ink


def test_pictures_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        comparison(torch.zeros(3, 8, 8), torch.zeros(3, 8, 9), "")
