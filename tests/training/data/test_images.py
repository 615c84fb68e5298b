"""Images of every kind become plain RGB or grey, or one clear error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmp_common import PatchError
from tests.training.data.making import encoded, picture
from training.data.images import is_image, open_image, to_tensor, upright_size


def opened(data: bytes, channels: int = 3) -> np.ndarray:
    assert upright_size(io.BytesIO(data), "x") == open_image(io.BytesIO(data), "x", channels).size
    return np.asarray(open_image(io.BytesIO(data), "x", channels))


def test_plain_images_keep_their_values() -> None:
    image = picture(1)
    assert np.array_equal(opened(encoded(image)), np.asarray(image))
    assert opened(encoded(image), channels=1).ndim == 2
    for kind in ("JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        assert opened(encoded(image, kind)).shape == (40, 40, 3) or image.size != (40, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_are_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    for x in range(2):
        image.putpixel((x, 0), (0, 0, 255, 0))
    data = encoded(image.convert(mode) if mode != "PA" else image.quantize(8), "PNG")
    pixels = opened(data)
    assert (pixels[0, :2] == 255).all()
    assert (pixels[1] < 255).any()


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    data = io.BytesIO()
    image.save(data, "PNG", transparency=1)
    assert opened(data.getvalue()).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_half_transparent_is_blended() -> None:
    pixels = opened(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert abs(int(pixels[0, 0, 0]) - 127) <= 1


def test_cmyk() -> None:
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    pixels = opened(encoded(image, "JPEG"))
    assert pixels[..., 0].min() > 200 and pixels[..., 1].max() < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert opened(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_bilevel_and_grey() -> None:
    assert opened(encoded(Image.new("1", (3, 3), 1))).min() == 255
    assert opened(encoded(Image.new("L", (3, 3), 7))).tolist() == [[[7] * 3] * 3] * 3


def test_the_first_frame_of_an_animation() -> None:
    data = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    assert opened(data.getvalue())[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    image = picture(2, (6, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, "PNG", exif=exif)
    pixels = opened(data.getvalue())
    assert pixels.shape[:2] == ((6, 4) if orientation >= 5 else (4, 6))
    if orientation == 6:  # the camera was turned: the first column is the last row
        assert np.array_equal(pixels, np.rot90(np.asarray(image), k=-1))


def test_values_of_the_tensor() -> None:
    tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    assert tensor.shape == (3, 1, 1)
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert to_tensor(Image.new("L", (5, 3))).shape == (1, 3, 5)


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"", "not an image"), (b"hello", "not an image"), (encoded(picture(1))[:30], "")],
)
def test_what_is_no_image(data: bytes, found: str) -> None:
    with pytest.raises(PatchError, match=f"image in a/b.png, found .*{found}.*: repair"):
        upright_size(io.BytesIO(data), "a/b.png")


def test_a_cut_image_is_found_when_it_is_decoded() -> None:
    data = encoded(picture(1))
    assert upright_size(io.BytesIO(data[:-200]), "cut.png") == picture(1).size
    with pytest.raises(PatchError, match=r"cut\.png"):
        open_image(io.BytesIO(data[:-200]), "cut.png")


def test_floating_point_images_are_refused() -> None:
    data = encoded(Image.new("F", (2, 2), 0.5), "TIFF")
    with pytest.raises(PatchError, match="floating point"):
        open_image(io.BytesIO(data), "x.tif")


def test_a_bomb_is_an_error_that_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PatchError, match=r"big\.png, found .*exceeds limit"):
        upright_size(io.BytesIO(encoded(picture(1))), "big.png")


def test_files_of_the_system_are_no_images() -> None:
    assert is_image(Path("a/B.JPG")) and is_image(Path("x.webp"))
    assert not is_image(Path("a/._b.jpg")) and not is_image(Path("a.txt"))
