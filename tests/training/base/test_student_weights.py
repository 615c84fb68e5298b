"""Files in fewer bits as people have them: GGUF and fp8, in both namings, and bad ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmp_common import PatchError, detect_base
from tests.training import tinyfiles
from tests.training.base.test_cheap import both, output
from tests.training.base.test_memory import config_of, gradients
from tests.training.conftest import Folders
from training.base.cheap import cheap_base, student_facts
from training.base.frozen import FrozenBase, load_frozen
from training.base.layers import linear_layers
from training.base.stored import StoredLinear

tinyggufs = pytest.importorskip("tests.training.tinyggufs", reason="needs gguf")


def plain(cheap: FrozenBase, like: FrozenBase) -> dict[str, Tensor]:
    """The values that a cheap model computes with, by the names of the exact one's parameters."""
    layers = {
        f"{path}.weight": layer.values(torch.float32)
        for path, layer in linear_layers(cheap.model).items()
        if isinstance(layer, StoredLinear)
    }
    return {name: layers.get(name, value.data) for name, value in cheap.model.named_parameters()}


def weights(folder: Path, name: str, naming: str) -> dict[str, Tensor]:
    if naming == "original":
        return tinyfiles.denoiser_tensors(folder, name)
    return tinyfiles.weights_of(folder / ("unet" if name.startswith("sd1") else "transformer"))


FILES = [
    ("sd15", "original", "model.diffusion_model."), ("sd15", "diffusers", ""),
    ("sdxl", "original", ""), ("sd3", "original", ""), ("flux", "original", ""),
    ("flux", "diffusers", "model.diffusion_model."), ("dit", "diffusers", ""),
    ("pixart", "diffusers", ""), ("lumina2", "original", "model.diffusion_model."),
    ("z-image", "original", ""), ("flux2", "original", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "naming", "prefix"), FILES)
def test_gguf_files(
    name: str, naming: str, prefix: str, folders: Folders, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A model in Q4_0 is the model whose weights are the values that the package gguf reads."""
    tinyfiles.narrow(monkeypatch)
    folder = folders(name)
    tensors = {prefix + key: value for key, value in weights(folder, name, naming).items()}
    if prefix:
        tensors["first_stage_model.conv.weight"] = torch.zeros(4, 4)  # of another part: not read
    path = tinyggufs.write_gguf(tmp_path / "student.gguf", tensors)
    exact, cheap, config = both(name, folder, student_weights=str(path))
    assert detect_base(cheap.model) is exact.base
    stored = [
        layer for layer in linear_layers(cheap.model).values() if layer.weight.dtype == torch.uint8
    ]
    assert len(stored) > 10
    read = {key.removeprefix(prefix): value for key, value in tinyggufs.read_values(path).items()}
    read.pop("first_stage_model.conv.weight", None)
    single = tinyfiles.save(tmp_path / "single.safetensors", read)
    if naming == "diffusers":
        exact.model.load_state_dict(read, strict=False)
    else:
        exact = load_frozen(config_of(name, single, base_config=str(folder)))
    for key, value in plain(cheap, exact).items():
        expected = exact.model.get_parameter(key)
        # diffusers multiplies in half precision, gguf in single precision.
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-6), key
    difference = (output(cheap, name) - output(exact, name)).abs().max()
    assert float(difference) < 0.02 * float(output(exact, name).abs().max())
    facts = student_facts(cheap, config)
    assert facts["quantization"] == "q4_0"
    assert facts["file"]["name"] == "student.gguf"
    assert len(facts["file"]["sha256"]) == 10
    assert sum(facts["types"].values()) == sum(value.numel() for value in read.values())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders("dit")
    path = tinyggufs.write_gguf(tmp_path / "k.gguf", weights(folder, "dit", "diffusers"), kind)
    exact, cheap, config = both("dit", folder, student_weights=str(path))
    read = tinyggufs.read_values(path)
    for key, value in plain(cheap, exact).items():
        assert torch.allclose(value, read[key], rtol=4e-3, atol=1e-3), key
    assert student_facts(cheap, config)["quantization"] == kind.lower()


def in_fp8(tensors: dict[str, Tensor], scaled: str | None) -> dict[str, Tensor]:
    """Matrices of blocks in fp8, with ComfyUI's scales where a name for them is given."""
    found = {}
    for name, value in tensors.items():
        if value.dim() != 2 or not name.endswith(".weight"):
            found[name] = value
            continue
        scale = value.abs().max() / 448 if scaled else torch.tensor(1.0)
        found[name] = (value / scale).to(torch.float8_e4m3fn)
        if scaled:
            found[name.removesuffix("weight") + scaled] = scale
    if scaled:
        found["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return found


@pytest.mark.parametrize(
    ("name", "naming", "scaled"),
    [
        ("sd15", "original", "scale_weight"), ("flux", "original", "weight_scale"),
        ("sd3", "original", "scale_weight"), ("dit", "diffusers", None),
        ("flux2", "original", "weight_scale"),
    ],
)  # fmt: skip
def test_fp8_files(
    name: str, naming: str, scaled: str | None, folders: Folders, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tinyfiles.narrow(monkeypatch)
    folder = folders(name)
    tensors = weights(folder, name, naming)
    path = tinyfiles.save(tmp_path / "fp8.safetensors", in_fp8(tensors, scaled))
    exact, cheap, config = both(name, folder, student_weights=str(path))
    for key, value in plain(cheap, exact).items():
        expected = exact.model.get_parameter(key)
        error = float((value - expected).abs().max())
        # fp8 has three bits behind the first; below 2^-6 its steps are even, unless it is scaled.
        assert error <= 2**-4 * float(expected.abs().max()) + (0 if scaled else 2**-10), key
    assert torch.isfinite(output(cheap, name)).all()
    facts = student_facts(cheap, config)
    assert facts["quantization"] == "f8_e4m3"
    assert set(facts["types"]) == {"F8_E4M3", "F32"}
    assert sum(facts["types"].values()) == sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_gradients_are_those_of_the_values(name: str, folders: Folders, tmp_path: Path) -> None:
    """And no value of a weight is kept between the passes."""
    folder = folders(name)
    path = tinyggufs.write_gguf(tmp_path / "q.gguf", weights(folder, name, "diffusers"))
    exact, cheap, _ = both(name, folder, student_weights=str(path))
    for key, value in plain(cheap, exact).items():
        exact.model.get_parameter(key).data = value
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        found = gradients(cheap, name)
    for key, value in gradients(exact, name).items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    if name == "flux":  # in which no activation has the shape of a weight
        shapes = {tuple(layer.weight.shape) for layer in linear_layers(exact.model).values()}
        assert not set(kept) & (shapes | {shape[::-1] for shape in shapes})


def spoiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without one tensor, with one too many, and with one of another shape."""
    first, second = list(tensors)[3], list(tensors)[8]
    rest = {name: value for name, value in tensors.items() if name != first}
    return {**rest, "strange": torch.zeros(3), second: torch.zeros(7)}


def test_what_a_file_lacks_is_listed_at_once(folders: Folders, tmp_path: Path) -> None:
    folder = folders("sd15")
    tensors = tinyfiles.weights_of(folder / "unet")
    path = tinyggufs.write_gguf(tmp_path / "q.gguf", spoiled(tensors))
    with pytest.raises(PatchError) as caught:
        both("sd15", folder, student_weights=str(path))
    message = str(caught.value)
    assert f"no {list(tensors)[3]}" in message
    assert "strange, which it has not" in message
    assert f"{list(tensors)[8]} of shape (7,)" in message


def test_files_that_are_no_students(folders: Folders, tmp_path: Path) -> None:
    """Of another base, in full precision, in a type that nothing reads, with another ending."""
    dit, sd15 = (tinyfiles.weights_of(folders("dit") / "transformer"),
                 tinyfiles.weights_of(folders("sd15") / "unet"))  # fmt: skip
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    ggufs = {
        kind: tinyggufs.write_gguf(tmp_path / f"{kind}.gguf", sd15, kind)
        for kind in ("F16", "TQ2_0")
    }
    for path, message in (
        (tinyggufs.write_gguf(tmp_path / "a.gguf", dit), "base tiny-sd15, found those of tiny-dit"),
        (ggufs["F16"], "expected a model in IQ4_NL.*found F16, F32"),
        (ggufs["TQ2_0"], "expected a model in .*found F32, TQ2_0"),
        (
            tinyfiles.save(tmp_path / "i.safetensors", {**sd15, "a.weight": torch.ones(2).int()}),
            "expected a model in F8_E4M3.*found F32, I32",
        ),
        (pickled, "expected a file ending in .gguf or .safetensors, found .ckpt"),
        (tmp_path / "none.gguf", "expected a file for --student_weights, found nothing"),
    ):
        with pytest.raises(PatchError, match=message):
            both("sd15", folders("sd15"), student_weights=str(path))


def test_another_model_in_full_precision_is_a_student(folders: Folders, tmp_path: Path) -> None:
    """One that was rounded elsewhere, pruned or merged: its shapes are the base's."""
    weights = tinyfiles.weights_of(folders("dit") / "transformer")
    path = tinyfiles.save(tmp_path / "other.safetensors", {n: w / 2 for n, w in weights.items()})
    cheap = both("dit", folders("dit"), student_weights=str(path))[1]
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(cheap.model.state_dict()[name], weights[name] / 2)


def test_scales_of_nothing_are_refused(folders: Folders, tmp_path: Path) -> None:
    tensors = in_fp8(tinyfiles.weights_of(folders("dit") / "transformer"), "scale_weight")
    tensors["transformer_blocks.0.nothing.scale_weight"] = torch.ones(1)
    path = tinyfiles.save(tmp_path / "fp8.safetensors", tensors)
    with pytest.raises(PatchError, match="for transformer_blocks.0.nothing.weight"):
        both("dit", folders("dit"), student_weights=str(path))


def test_a_missing_package_is_named(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "q.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = config_of("dit", folders("dit"), student_weights=str(path))
    with pytest.raises(PatchError, match="expected the package gguf.*pip install gguf"):
        cheap_base(load_frozen(config), config)
