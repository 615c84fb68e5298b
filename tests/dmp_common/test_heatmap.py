"""Pictures of the gate: facts about their pixels and texts."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dmp_common import Patch, PatchError, bases, register_base
from dmp_common.tools import drawing
from dmp_common.tools.drawing import ColourScale, Layout
from dmp_common.tools.heatmap import (
    choose_sites,
    even_timesteps,
    gate_heatmap,
    gate_values,
    save_heatmap,
)

BASE = register_base(
    bases.dit(
        "six-blocks", depth=6, width=96, patch_size=2, in_channels=1, frequency_shift=1, grid=(4, 4)
    )
)
STEPS = torch.tensor([999.0, 700.0, 400.0, 0.0])


def embedding(timesteps: torch.Tensor, size: int = 96) -> torch.Tensor:
    """A stand-in for a time embedding: channel 0 is the timestep, from 0 to 1."""
    e = torch.zeros(len(timesteps), size)
    e[:, 0] = timesteps / 1000
    return e


def random_patch(**variant: object) -> Patch:
    """A patch for base six-blocks (6 sites, 4 x 4 prompts) with a random gate."""
    patch = Patch.create(BASE, **variant).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in patch.gate.parameters():
            parameter.normal_(generator=generator)
    return patch


def early_patch(prompt: int) -> Patch:
    """A patch whose gate prefers one prompt, the more the noisier."""
    patch = Patch.create(BASE)
    with torch.no_grad():
        patch.gate.weight[prompt, 0] = 1.5
    return patch


def light(image: Image.Image, box: drawing.Box) -> np.ndarray:
    """Lightness of the pixels in a box (H, W)."""
    return np.asarray(image.crop(box).convert("L")).astype(int)


def cells(image: Image.Image, box: drawing.Box, rows: int, columns: int) -> np.ndarray:
    """Lightness at the middle of each of rows x columns cells in a box."""
    pixels = light(image, box)
    ys = ((np.arange(rows) + 0.5) * pixels.shape[0] / rows).astype(int)
    xs = ((np.arange(columns) + 0.5) * pixels.shape[1] / columns).astype(int)
    return pixels[np.ix_(ys, xs)]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is written into pictures."""
    written: list[str] = []
    real = drawing.write

    def write(image: Image.Image, text: str, *args: object, **options: object) -> None:
        written.append(text)
        real(image, text, *args, **options)

    monkeypatch.setattr(drawing, "write", write)
    return written


def test_preferred_prompt_is_bright_where_the_gate_prefers_it(texts):
    patch = early_patch(prompt=6)
    image = gate_heatmap(patch, STEPS, embedding(STEPS))
    layout = Layout.of((4, 4), 3, len(STEPS))
    for row in range(3):
        panel = cells(image, layout.weights(row), 16, 4)  # (prompts, timesteps)
        others = np.delete(panel, 6, axis=0)
        assert (panel[6, :3] > others[:, :3].max(axis=0)).all()
        assert (np.diff(panel[6]) < 0).all()  # less and less towards the picture
        assert np.ptp(panel[:, 3]) == 0  # at timestep 0 all are equal
        first = cells(image, layout.map(row, 0), 4, 4)
        assert first.argmax() == 6
        last = cells(image, layout.map(row, 3), 4, 4)
        assert np.ptp(last) == 0
    for expected in ("t = 999", "t = 0", "prompt", "timestep, from noise to picture"):
        assert expected in texts
    assert "weight x 16 (mean 1)" in texts
    assert "block.0  (depth 0, 96 channels)" in texts
    assert [text.split()[0] for text in texts if "depth" in text] == [
        "block.0",
        "block.3",
        "block.5",
    ]


def test_zero_patch_is_flat_and_said_to_be_constant(texts):
    steps = even_timesteps()
    image = gate_heatmap(Patch.create(BASE), steps, torch.randn(50, 96))
    layout = Layout.of((4, 4), 3, 50, maps=0)  # squares of one colour would say nothing
    for box in (layout.weights(0), layout.bar(1)):
        assert np.ptp(light(image, box)) == 0
    assert texts.count("constant weight x 16 (mean 1)") == 3
    assert texts.count("1") == 3  # the only tick of each colour bar


def test_order_of_timesteps_does_not_matter():
    patch, shuffled = random_patch(), torch.tensor([400.0, 999.0, 0.0, 700.0])
    images = [gate_heatmap(patch, t, embedding(t)) for t in (STEPS, shuffled)]
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"gate": "attention"}, "Attention gate. 4 x 4 prompts"),
        ({"gate": "none"}, "No gate: every weight is 1 at every timestep"),
        ({"selection": "hard"}, "hard: the top 75 % have weight 1"),
        ({"across_depth": "uniform"}, "Linear gate"),
        ({"condition": "t+y"}, "Linear gate"),
        ({"grids": 3}, "3 grids of 4 x 4 prompts. Right: as maps, the grids summed, x 16"),
        ({"grids": 3, "selection": "hard"}, "the grids averaged"),
        (
            {"grids": 3, "gate_unit": "grid", "gate_init": "random"},
            "Linear gate. 3 grids of 2 x 2 prompts, each with one weight",
        ),
        (
            {"grids": 2, "gate_unit": "grid", "gate_form": "residual"},
            "Residual linear gate. 2 grids of 3 x 3 prompts, each with one weight",
        ),
        ({"gate_form": "residual"}, "Residual linear gate. 4 x 4 prompts"),
        ({"timesteps": (0, 500)}, "Linear gate, off but at timesteps 0 to 500. 4 x 4 prompts"),
        ({"mix": "prepend"}, "50 prompts in front of the image tokens"),
        ({"grid": (2, 5)}, "2 x 5 prompts"),
        ({"grid": (3, 300)}, "3 x 300 prompts"),
        ({"grid": (1, 1)}, "1 x 1 prompts"),
        ({"sites": 1}, "Linear gate"),
    ],
    ids=str,
)
def test_every_variant_renders(variant, said, texts):
    patch = random_patch(**variant)
    image = gate_heatmap(patch, STEPS, embedding(STEPS))
    assert image.mode == "RGB"
    assert said in "\n".join(texts)
    alike = {"gate": "none"}, {"grid": (1, 1)}, {"mix": "prepend"}
    maps = variant not in alike and variant.get("gate_unit") != "grid"
    assert any(text.startswith("t = ") for text in texts) == maps
    if variant in alike[:2]:
        assert variant == {"gate": "none"} or "the same at every place" in "\n".join(texts)


def test_hard_gate_shows_two_colours_and_no_gate_one():
    layout = Layout.of((4, 4), 3, 4)
    hard = gate_heatmap(random_patch(selection="hard"), STEPS, embedding(STEPS))
    panel = cells(hard, layout.weights(0), 16, 4)
    assert len(np.unique(panel)) == 2
    assert ((panel == panel.max()).sum(0) == 12).all()
    layout = Layout.of((4, 4), 3, 4, maps=0)
    none = gate_heatmap(random_patch(gate="none"), STEPS, embedding(STEPS))
    assert np.ptp(light(none, layout.weights(0))) == 0


def test_maps_of_several_grids_show_their_sum():
    patch = Patch.create(BASE, grid=2, grids=2)
    logits = torch.tensor([2.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 1.5])
    with torch.no_grad():
        patch.gate.bias.copy_(logits)
    image = gate_heatmap(patch, STEPS, embedding(STEPS))
    weights = logits.softmax(0)
    values = (weights * 8).numpy()
    summed = (weights.reshape(2, 2, 2).sum(0) * 4).numpy()
    expected = ColourScale(values.min(), values.max()).colours(summed)
    layout = Layout.of((2, 2), 3, 4)
    left, top, _, _ = layout.map(0, 1)
    found = [
        [image.getpixel((left + 64 + 128 * x, top + 64 + 128 * y)) for x in (0, 1)] for y in (0, 1)
    ]
    assert np.abs(np.array(found) - expected.astype(int)).max() <= 1


def test_shared_scale_compares_sites_and_own_scale_does_not():
    patch = early_patch(prompt=6)
    with torch.no_grad():
        patch.gate.weight[6, -1] = 0.3  # grows with the depth
    layout = Layout.of((4, 4), 2, 4)
    brightest = {}
    for scale in ("per-panel", "shared"):
        image = gate_heatmap(
            patch, STEPS, embedding(STEPS), sites="first,last", scale=scale, log=False
        )
        brightest[scale] = [cells(image, layout.weights(row), 16, 4).max() for row in (0, 1)]
    assert brightest["per-panel"][0] == brightest["per-panel"][1]
    assert brightest["shared"][0] < brightest["shared"][1]


def test_colours_are_logarithmic_where_a_prompt_dominates(texts):
    patch = early_patch(prompt=6)
    with torch.no_grad():
        patch.gate.bias[6] = 5.0
    gate_heatmap(patch, STEPS, embedding(STEPS))
    assert texts.count("weight x 16 (mean 1), log") == 3
    assert {"< 0.1", "1", "10"} <= set(texts)
    texts.clear()
    gate_heatmap(patch, STEPS, embedding(STEPS), log=False)
    assert texts.count("weight x 16 (mean 1)") == 3


def test_values_are_gate_weights_times_their_number():
    patch, e = random_patch(), embedding(STEPS)
    steps, values = gate_values(patch, STEPS, e)
    assert steps.tolist() == STEPS.tolist()
    assert np.allclose(values, patch.gate_weights(e).detach().numpy() * 16)
    assert np.allclose(values.mean(-1), 1, atol=1e-6)
    of_grids = random_patch(grids=3, gate_unit="grid", gate_init="random")
    assert np.allclose(gate_values(of_grids, STEPS, e)[1].mean(-1), 1, atol=1e-6)
    residual = random_patch(gate_form="residual")
    found = gate_values(residual, STEPS, e)[1]
    assert np.allclose(found, residual.gate_weights(e).detach().numpy(), atol=1e-6)
    part = random_patch(timesteps=(0, 500))
    found = gate_values(part, STEPS, e)[1]
    on = STEPS.numpy() < 500
    assert (found[~on] == 0).all() and np.allclose(found[on].mean(-1), 1, atol=1e-6)


def test_long_titles_fit(texts):
    title = "a long title " * 20
    image = gate_heatmap(random_patch(mix="prepend"), STEPS, embedding(STEPS), title=title)
    assert title in texts
    assert image.width > drawing.LEFT + drawing.text_width(title, drawing.TITLE)


def test_one_timestep_and_many(texts):
    one = torch.tensor([500.0])
    gate_heatmap(random_patch(), one, embedding(one))
    assert texts.count("500") == 3  # one tick a row
    assert texts.count("t = 500") == 3
    texts.clear()
    gate_heatmap(random_patch(), STEPS, embedding(STEPS), maps=0)
    assert not any(text.startswith("t = ") for text in texts)
    many = even_timesteps(1000)
    gate_heatmap(random_patch(), many, embedding(many))


def test_font_of_old_pillow(monkeypatch):
    real = ImageFont.load_default

    def old(*size: float) -> object:
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return real()

    expected = gate_heatmap(random_patch(), STEPS, embedding(STEPS))
    monkeypatch.setattr(ImageFont, "load_default", old)
    drawing._font.cache_clear()
    image = gate_heatmap(random_patch(), STEPS, embedding(STEPS))
    drawing._font.cache_clear()
    box = Layout.of((4, 4), 3, 4).weights(1)
    assert image.crop(box).tobytes() == expected.crop(box).tobytes()
    assert image.height == expected.height


def test_save_replaces_a_picture(tmp_path):
    path = tmp_path / "new folder" / "gate.PNG"
    for patch in (Patch.create(BASE), random_patch()):
        assert save_heatmap(path, patch, STEPS, embedding(STEPS), title="same") == path
        with Image.open(path) as image:
            assert image.format == "PNG"
            expected = gate_heatmap(patch, STEPS, embedding(STEPS), title="same")
            assert image.convert("RGB").tobytes() == expected.tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["gate.PNG"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": "block.9"}, "found 'block.9'"),
        ({"sites": []}, "found none"),
        ({"scale": "own"}, "expected scale per-panel or shared, found 'own'"),
        ({"e": torch.zeros(4, 95)}, r"found \(4,\) and \(4, 95\)"),
        ({"timesteps": torch.zeros(3)}, r"found \(3,\) and \(4, 96\)"),
        ({"e": torch.full((4, 96), torch.nan)}, "found NaN"),
    ],
    ids=["site", "no site", "scale", "embedding", "timesteps", "NaN"],
)
def test_wrong_requests_are_refused(change, message):
    request = {"patch": random_patch(), "timesteps": STEPS, "e": embedding(STEPS), **change}
    with pytest.raises(PatchError, match=message):
        gate_heatmap(**request)


def test_only_png_is_written(tmp_path):
    with pytest.raises(PatchError, match=r"ending in \.png"):
        save_heatmap(tmp_path / "gate.jpg", random_patch(), STEPS, embedding(STEPS))
    assert not list(tmp_path.iterdir())


def test_choice_of_sites():
    patch = Patch.create("sd15", sites=["in.1", "in.4", "mid", "out.3"])
    assert choose_sites(patch) == ["in.1", "mid", "out.3"]
    assert choose_sites(patch, "all") == list(patch.sites)
    assert choose_sites(patch, "out.3, in.1") == ["in.1", "out.3"]
    assert choose_sites(patch, ["last", "encoder"]) == list(patch.sites)
    assert choose_sites(Patch.create(BASE, sites=1)) == ["block.0"]
    with pytest.raises(PatchError, match=r"found 'in\.2'"):
        choose_sites(patch, "in.1,in.2")
