"""The patch file: exact round trips, and one clear error for everything that is not a patch."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from dmp_common import Patch, PatchError, attach
from dmp_common.patch.file import file_hash, read_header, read_patch_file, write_patch_file
from tests.tiny import FAMILIES

TINY = FAMILIES["dit"]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    TINY.patch().save(path, {"ss_num_train_images": "12"})
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, body = parts(path)
    change(header)
    path.write_bytes(join(header, body))


def reconfigure(path: Path, **entries: object) -> None:
    def change(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["dmp.config"])
        header["__metadata__"]["dmp.config"] = json.dumps({**config, **entries})

    rewrite(path, change)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "attention": {"gate": "attention"},
    "none": {"gate": "none"},
    "hard": {"selection": "hard"},
    "uniform": {"across_depth": "uniform"},
    "prepend": {"mix": "prepend"},
    "first two sites": {"sites": 2},
    "t+y": {"condition": "t+y"},
    "random": {"prompt_init": "random", "gate_init": "random"},
    "three grids": {"grids": 3, "grid": (2, 5)},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_is_exact(variant: dict[str, Any], tmp_path: Path) -> None:
    patch = TINY.patch(**variant)
    digest = patch.save(tmp_path / "p.safetensors", {"ss_seed": "3"})
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.variant == patch.variant
    assert loaded.metadata["ss_seed"] == "3"
    assert not loaded.training
    assert digest == file_hash(tmp_path / "p.safetensors")
    assert re.fullmatch("[0-9a-f]{10}", digest)
    for (name, saved), (other, read) in zip(
        patch.tensors().items(), loaded.tensors().items(), strict=True
    ):
        assert name == other
        assert torch.equal(saved, read)


def test_scale_of_learning_is_folded_in(tmp_path: Path) -> None:
    patch = TINY.patch()
    before = {name: tensor.clone() for name, tensor in patch.tensors().items()}
    patch.scale_for_learning()
    patch.save(tmp_path / "p.safetensors")
    loaded = Patch.load(tmp_path / "p.safetensors")
    assert loaded.learning_scale == 1.0
    for name, tensor in loaded.tensors().items():
        assert torch.equal(tensor, before[name])  # 16 prompts: a power of two is exact


def test_file_holds_what_the_format_says(good: Path) -> None:
    header, _ = parts(good)
    metadata = header.pop("__metadata__")
    assert set(header) == {
        "gate.weight", "gate.bias", "prompts.block.0", "prompts.block.1", "prompts.block.2",
    }  # fmt: skip
    assert header["prompts.block.0"]["shape"] == [1, 16, 32]
    assert header["gate.weight"]["shape"] == [16, 33]
    config = json.loads(metadata["dmp.config"])
    assert config["base"] == "tiny-dit"
    assert config["sites"] == {"block.0": 0, "block.1": 1, "block.2": 2}
    assert config["grid"] == [4, 4]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"].endswith("/dmp")
    assert "ss_network_module" not in metadata
    assert read_header(good).variant == TINY.patch().variant


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype: torch.dtype, tmp_path: Path) -> None:
    patch = TINY.patch()
    patch.save(tmp_path / "p.safetensors", dtype=dtype)
    loaded = Patch.load(tmp_path / "p.safetensors")
    for name, tensor in patch.tensors().items():
        assert loaded.tensors()[name].dtype == torch.float32
        assert torch.equal(loaded.tensors()[name], tensor.to(dtype).float())


def test_loaded_values_do_not_live_in_the_file(good: Path) -> None:
    patch = Patch.load(good)
    before = patch.tensors()["gate.weight"].clone()
    good.write_bytes(b"\0" * good.stat().st_size)
    assert torch.equal(patch.tensors()["gate.weight"], before)


def test_failed_saving_keeps_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = good.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            TINY.patch(seed=5).save(good)
    bad = TINY.patch()
    with torch.no_grad():
        bad.gate.bias[0] = float("nan")
    with pytest.raises(PatchError, match=r"gate\.bias.*nothing was written"):
        bad.save(good)
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_saving_refuses_other_endings_and_metadata(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"\.safetensors"):
        TINY.patch().save(tmp_path / "p.pt")
    with pytest.raises(PatchError, match="text"):
        TINY.patch().save(tmp_path / "p.safetensors", {"ss_seed": 3})  # type: ignore[dict-item]


def test_files_are_variant_tensors_and_metadata(good: Path, tmp_path: Path) -> None:
    contents = read_patch_file(good)
    variant, tensors, metadata = contents
    assert variant == TINY.patch().variant
    assert {n: tuple(t.shape) for n, t in tensors.items()} == variant.shapes()
    assert list(tensors) == list(variant.shapes())
    assert metadata["ss_num_train_images"] == "12"
    again = tmp_path / "good.safetensors"
    assert write_patch_file(again, *contents) == file_hash(good)
    missing = {name: t for name, t in tensors.items() if name != "gate.bias"}
    with pytest.raises(PatchError, match=r"gate\.bias missing"):
        write_patch_file(again, variant, missing)
    with pytest.raises(PatchError, match=r"gate\.bias \(3,\)"):
        write_patch_file(again, variant, {**tensors, "gate.bias": torch.zeros(3)})
    assert file_hash(again) == file_hash(good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_half_precision_cannot_hold_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    patch = TINY.patch()
    with torch.no_grad():
        patch.pool("block.1").prompts[0, 2, 3] = -65504.0
    if dtype != torch.bfloat16:  # which has 65536 instead
        patch.save(path, dtype=dtype)
        assert Patch.load(path).pool("block.1").prompts.min() == -65504.0
    with torch.no_grad():
        patch.pool("block.1").prompts[0, 2, 3] = -65600.0
    with pytest.raises(PatchError, match=r"prompts\.block\.1.*nothing was written"):
        patch.save(path, dtype=dtype)


def test_sums_of_grids_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A softmax mixes grids; where weights are ones, they add."""
    for options, refused in (({}, False), ({"gate": "none"}, True), ({"selection": "hard"}, True)):
        patch = TINY.patch(grids=2, **options)
        with torch.no_grad():
            patch.pool("block.0").prompts[:, 0, 0] = torch.tensor([4e4, -4e4])
        path = tmp_path / "p.safetensors"
        if not refused:
            patch.save(path)
            continue
        with pytest.raises(PatchError, match="8e\\+04 as the sum of the grids in prompts.block.0"):
            patch.save(path)


# What is wrong with the file, how it came to be, and what the message must say.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated body": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "whole safetensors file"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "wrong magic": (lambda p: p.write_bytes(b"hello world, this is text"), "claims"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 64), "claims 18446744073709551615"),
    "pickle renamed": (
        lambda p: p.write_bytes(pickle.dumps({"gate.weight": 1}, protocol=2)),
        "pickle",
    ),
    "torch.save renamed": (lambda p: torch.save({"a": torch.ones(2)}, p), "pickle"),
    "header is no JSON": (lambda p: p.write_bytes(join(b"{oops", b"")), "JSON"),
    "header is a list": (lambda p: p.write_bytes(join([1], b"")), "list"),
    "a LoRA": (
        lambda p: save_file({"lora_unet_x.lora_up.weight": torch.ones(2)}, p),
        "DMP patch, found a LoRA",
    ),
    "a checkpoint": (
        lambda p: save_file({"model.diffusion_model.out.0.weight": torch.ones(2)}, p),
        "model checkpoint",
    ),
    "other tensors": (lambda p: save_file({"x": torch.ones(2)}, p), "1 tensors"),
    "unknown version": (
        lambda p: rewrite(p, lambda h: h["__metadata__"].update({"dmp.format_version": "9"})),
        "version '9': update",
    ),
    "no configuration": (
        lambda p: rewrite(p, lambda h: h["__metadata__"].pop("dmp.config")),
        "dmp.config",
    ),
    "unknown base": (lambda p: reconfigure(p, base="sd99"), "known bases"),
    "unknown variant": (lambda p: reconfigure(p, gate="quantum"), "linear, attention, none"),
    "unknown entry": (lambda p: reconfigure(p, future=1), "future"),
    "wrong depth": (lambda p: reconfigure(p, sites={"block.0": 7}), "depth"),
    "grid of one number": (lambda p: reconfigure(p, grid=4), "grid"),
    "grid that does not fit": (lambda p: reconfigure(p, grid=[4, 5]), "grid"),
    "grid of fractions": (lambda p: reconfigure(p, grid=[4.0, 4.0]), "grid"),
    "no sites": (lambda p: reconfigure(p, sites={}), "sites"),
    "shift of text": (lambda p: reconfigure(p, frequency_shift="1"), "frequency shift"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_one_clear_error(
    damage: tuple[Callable[[Path], object], str], good: Path
) -> None:
    spoil, message = damage
    spoil(good)
    with pytest.raises(PatchError) as caught:
        Patch.load(good)
    text = str(caught.value)
    assert str(good) in text
    assert re.search(message, text), text
    assert "expected" in text
    assert "found" in text
    assert text.endswith(".")


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], None], path: Path) -> None:
    header, _ = parts(path)
    tensors = load(path.read_bytes())
    change(tensors)
    path.write_bytes(save(tensors, metadata=header["__metadata__"]))


TENSOR_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("gate.bias"), r"without gate\.bias"),
    "extra": (lambda t: t.update(w_noise=torch.ones(1)), "with w_noise"),
    "shape": (lambda t: t.update({"gate.bias": torch.ones(17)}), r"shape \(16,\), found \(17,\)"),
    "dtype": (
        lambda t: t.update({"gate.bias": torch.ones(16, dtype=torch.float64)}),
        "F32, F16, BF16, found F64",
    ),
    "integers": (lambda t: t.update({"gate.bias": torch.ones(16, dtype=torch.int32)}), "found I32"),
    "NaN": (lambda t: t["gate.bias"][3].fill_(float("nan")), "NaN"),
    "infinity": (lambda t: t["prompts.block.1"][0, 1, 2].fill_(float("inf")), r"block\.1"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES.values(), ids=TENSOR_DAMAGES)
def test_wrong_tensors_are_named(
    damage: tuple[Callable[[dict[str, torch.Tensor]], Any], str], good: Path
) -> None:
    change, message = damage
    changed_tensors(change, good)
    with pytest.raises(PatchError, match=message):
        Patch.load(good)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="check the path"):
        Patch.load(tmp_path / "none.safetensors")
    with pytest.raises(PatchError, match="folder"):
        Patch.load(tmp_path)


def test_patch_of_another_base_is_refused_by_a_model(good: Path) -> None:
    other = FAMILIES["sd15"].model()
    with pytest.raises(PatchError, match="base tiny-dit, found one of base tiny-sd15"):
        attach(other, Patch.load(good))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=8),
    lambda child: (
        st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a patch file: of its bytes, its header or its configuration."""
    kind = draw(st.sampled_from(["bytes", "cut", "header", "entry", "config", "tensor"]))
    value, spot, byte = draw(JSON), draw(st.integers(0, 10**6)), draw(st.integers(0, 255))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))

    def mutate(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        tensors = sorted(set(header) - {"__metadata__"})
        if kind == "bytes":
            # Half of the changes hit the header, or nearly all would hit values.
            place = spot % (len(data) if spot % 2 else length + 8)
            return data[:place] + bytes([byte]) + data[place + 1 :]
        if kind == "cut":
            return data[: spot % len(data)]
        if kind == "header":
            return join(value, body)
        if kind == "entry":
            header[sorted(header)[spot % len(header)]] = value
        if kind == "tensor":
            header[tensors[spot % len(tensors)]][field] = value
        if kind == "config":
            config = json.loads(header["__metadata__"]["dmp.config"])
            config[sorted(config)[spot % len(config)]] = value
            header["__metadata__"]["dmp.config"] = json.dumps(config)
        return join(header, body)

    return mutate


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutate=mutations())
def test_no_mutation_escapes_the_one_error(mutate: Callable[[bytes], bytes], good: Path) -> None:
    path = good.with_name("mutated.safetensors")
    path.write_bytes(mutate(good.read_bytes()))
    try:
        patch = Patch.load(path)
    except PatchError as error:
        assert str(path) in str(error)
        return
    assert all(bool(tensor.isfinite().all()) for tensor in patch.tensors().values())


def test_equal_patches_make_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """The hash that hosts show must not depend on the order of a hash table."""
    code = (
        "import sys, dmp_common as dmp\n"
        "dmp.Patch.create('digits').save(sys.argv[1], "
        "{f'ss_{n}': chr(233) * n for n in range(20)} | {'modelspec.date': 'then'})"
    )
    root = Path(__file__).resolve().parents[2]
    files = [tmp_path / "same.safetensors", tmp_path / "other" / "same.safetensors"]
    for file in files:
        subprocess.run([sys.executable, "-c", code, str(file)], cwd=root, check=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata()["ss_19"] == chr(233) * 19
    assert Patch.load(files[0]).metadata["ss_3"] == chr(233) * 3
