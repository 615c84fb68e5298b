"""The cheap model beside the exact one: what differs, what is shared, what trains on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmp_common import PatchError, attach, detect_base
from tests.tiny import FAMILIES
from tests.training.base.test_memory import config_of, gradients
from tests.training.conftest import Folders
from tests.training.tinybases import TRAINED
from training.base.cheap import cheap_base, student_facts
from training.base.frozen import FrozenBase, load_frozen
from training.base.layers import linear_layers
from training.base.rounding import round_groups, round_rows
from training.base.stored import StoredLinear
from training.methods.known import METHODS
from training.options.config import TrainConfig


def both(name: str, folder: Path, **options: object) -> tuple[FrozenBase, FrozenBase, TrainConfig]:
    """The exact base and its cheap form."""
    config = config_of(name, folder, **options)
    exact = load_frozen(config)
    return exact, cheap_base(exact, config), config


def output(frozen: FrozenBase, name: str) -> torch.Tensor:
    inputs = FAMILIES[name].inputs(torch.tensor([3.0, 500.0]), (8, 8), frozen.dtype, 0)
    return FAMILIES[name].call(frozen.model, inputs)


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_linear_layers_of_the_blocks_are_rounded(name: str, folders: Folders) -> None:
    exact, cheap, _ = both(name, folders(name), student_quantization="rtn3")
    assert detect_base(cheap.model) is cheap.base is exact.base
    own, other = (dict(part.model.named_parameters()) for part in (exact, cheap))
    layers = linear_layers(exact.model)
    assert len(layers) >= 14
    assert not [path for path in layers if "emb." in path]
    for key, value in own.items():
        rounded = key.endswith(".weight") and key.removesuffix(".weight") in layers
        assert torch.equal(other[key], round_rows(value, 3) if rounded else value), key
        # What is equal takes no memory again.
        assert (other[key].data_ptr() == value.data_ptr()) is not rounded, key
    assert not torch.equal(output(exact, name), output(cheap, name))


@pytest.mark.parametrize(
    ("quantization", "round_as"),
    [("rtn4", lambda w: round_rows(w, 4)), ("rtn3-group32", lambda w: round_groups(w, 3))],
)
def test_the_name_says_how_weights_are_rounded(
    quantization: str, round_as: Callable[[torch.Tensor], torch.Tensor], folders: Folders
) -> None:
    exact, cheap, config = both("dit", folders("dit"), student_quantization=quantization)
    for path, layer in linear_layers(cheap.model).items():
        assert torch.equal(layer.weight, round_as(linear_layers(exact.model)[path].weight))
    facts = json.loads(json.dumps(student_facts(cheap, config)))
    rounded = sum(layer.weight.numel() for layer in linear_layers(exact.model).values())
    total = sum(value.numel() for value in exact.model.parameters())
    assert facts == {
        "quantization": quantization,
        "types": {quantization: rounded, "F32": total - rounded},
    }


@pytest.mark.parametrize("method", ["dmp", "lora", "full"])
@pytest.mark.parametrize("name", ["sd15", "dit", "flux"])
def test_methods_train_on_the_cheap_model_alone(name: str, method: str, folders: Folders) -> None:
    exact, cheap, config = both(
        name, folders(name), student_quantization="rtn3", method=method, recipe="none"
    )
    before = {key: value.clone() for key, value in exact.model.state_dict().items()}
    trained = METHODS[method](cheap, config)
    expected = output(exact, name).detach()
    for _ in range(2):  # a LoRA's first gradient is that of one matrix alone
        (output(cheap, name) - expected).square().mean().backward()
        for value in trained.trainable().values():
            if value.grad is not None:
                value.data -= 0.1 * value.grad
    assert sum(bool(v.grad is not None and v.grad.any()) for v in trained.trainable().values()) > 3
    for key, value in exact.model.state_dict().items():
        assert torch.equal(before[key], value), key
    assert all(value.grad is None for value in exact.model.parameters())


def test_a_patch_on_the_cheap_model_is_not_on_the_exact_one(folders: Folders) -> None:
    exact, cheap, _ = both("sd15", folders("sd15"), student_quantization="rtn8")
    assert gradients(cheap, "sd15").keys() == gradients(exact, "sd15").keys()
    patch = METHODS["dmp"](cheap, config_of("sd15", folders("sd15")))
    with attach(exact.model, patch.patch):  # type: ignore[attr-defined]
        pass
    patch.remove()


def test_without_a_cheap_form_there_is_no_cheap_model(folders: Folders) -> None:
    config = config_of("dit", folders("dit"))
    with pytest.raises(PatchError, match="expected --student_weights or --student_quant"):
        cheap_base(load_frozen(config), config)


PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes", "q": "gguf"}


def needs_package(quantization: str) -> None:
    for start, package in PACKAGES.items():
        if quantization.startswith(start):
            pytest.importorskip(package)


def values(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer computes with, whichever library stores it."""
    weight = layer.weight
    if isinstance(layer, StoredLinear):
        return layer.values(torch.float32)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight.float()


@pytest.mark.filterwarnings("ignore")  # of torchao and bitsandbytes, which differ in releases
@pytest.mark.parametrize(
    ("quantization", "name", "error", "kind"),
    [
        ("q4_0", "sd15", 0.15, "Q4_0"), ("q4_1", "dit", 0.1, "Q4_1"),
        ("q5_0", "pixart", 0.08, "Q5_0"), ("q5_1", "sd3", 0.05, "Q5_1"),
        ("q8_0", "flux", 0.01, "Q8_0"), ("fp8-scaled", "sd15", 0.05, "F8_E4M3"),
        ("fp8-scaled", "flux", 0.05, "F8_E4M3"), ("int8", "sd15", 0.02, "INT8"),
        ("int8", "flux", 0.02, "INT8"), ("int4", "dit", 0.15, "INT4"),
        ("int4", "flux", 0.15, "INT4"), ("nf4", "sd15", 0.15, "NF4"), ("nf4", "flux", 0.15, "NF4"),
    ],
)  # fmt: skip
def test_forms_of_other_libraries(
    quantization: str, name: str, error: float, kind: str, folders: Folders
) -> None:
    """Close to the exact weights, recorded, and trained on as on the values that they stand for."""
    needs_package(quantization)
    exact, cheap, config = both(name, folders(name), student_quantization=quantization)
    assert detect_base(cheap.model) is exact.base
    own, layers = linear_layers(exact.model), linear_layers(cheap.model)
    assert own.keys() == layers.keys()
    stored = 0
    for path, layer in layers.items():
        found, weight = values(layer), own[path].weight
        assert float((found - weight).norm() / weight.norm()) < error, path
        stored += weight.numel() if not torch.equal(found, weight) else 0
    facts = student_facts(cheap, config)
    assert facts["quantization"] == quantization
    assert facts["types"][kind] == stored > 0
    assert sum(facts["types"].values()) == sum(value.numel() for value in exact.model.parameters())
    found = gradients(cheap, name)
    for path, layer in layers.items():
        own[path].weight = torch.nn.Parameter(values(layer).detach(), requires_grad=False)
    for key, value in gradients(exact, name).items():
        assert torch.allclose(found[key], value, rtol=1e-2, atol=1e-3 * float(value.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["q4_0", "fp8", "fp8-scaled", "int8", "int4", "nf4"])
def test_a_lora_trains_on_every_form(quantization: str, folders: Folders) -> None:
    needs_package(quantization)
    _, cheap, config = both(
        "dit", folders("dit"), student_quantization=quantization, method="lora", recipe="none"
    )
    trained = METHODS["lora"](cheap, config)
    before = output(cheap, "dit")
    before.square().mean().backward()
    for value in trained.trainable().values():
        assert value.grad is not None
        value.data -= value.grad
    assert not torch.equal(before, output(cheap, "dit"))
    trained.remove()


def test_fp8_of_all_layers_leaves_the_exact_model(folders: Folders) -> None:
    """Its weights move between two precisions in place, so that none may be shared."""
    exact, cheap, config = both("sd15", folders("sd15"), student_quantization="fp8")
    before = output(exact, "sd15")
    assert gradients(cheap, "sd15").keys() == gradients(exact, "sd15").keys()
    assert torch.equal(before, output(exact, "sd15"))
    assert {value.dtype for value in exact.model.parameters()} == {torch.float32}
    types = student_facts(cheap, config)["types"]
    assert types["F8_E4M3"] > 0.9 * sum(types.values())


@pytest.mark.parametrize("quantization", ["q4_0", "fp8-scaled", "rtn4"])
def test_half_precision(quantization: str, folders: Folders) -> None:
    """The cheap model computes in the base's precision, also under autocast, with gradients."""
    needs_package(quantization)
    options = {"student_quantization": quantization}
    _, cheap, _ = both("dit", folders("dit"), mixed_precision="bf16", **options)
    _, whole, _ = both("dit", folders("dit"), **options)
    assert cheap.dtype == torch.bfloat16
    expected = output(whole, "dit")
    for found in (output(cheap, "dit"), autocast_output(whole)):
        assert found.dtype == torch.bfloat16
        assert float((found - expected).norm() / expected.norm()) < 0.05
    found, expected = gradients(cheap, "dit"), gradients(whole, "dit")
    for key, value in expected.items():
        assert float((found[key] - value).norm() / value.norm()) < 0.3, key


def autocast_output(frozen: FrozenBase) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return output(frozen, "dit")


def test_what_cannot_be_trained_is_said_at_once(folders: Folders) -> None:
    config = config_of(
        "dit", folders("dit"), student_quantization="fp8", student_weights="nowhere.gguf",
        method="full", blocks_to_swap=1, torch_compile=True,
    )  # fmt: skip
    with pytest.raises(PatchError) as caught:
        load_frozen(config)
    lines = [line.split(",")[0] for line in str(caught.value).splitlines()]
    asked = "--student_weights and --student_quantization"
    assert lines == [
        "expected --method dmp or prompt with --blocks_to_swap",
        "expected no --torch_compile with --blocks_to_swap",
        "expected one cheap model",
        "expected a file for --student_weights",
        "expected --method dmp",
        f"expected no --torch_compile with {asked} fp8",
        f"expected no --blocks_to_swap with {asked}",
    ]


@pytest.mark.parametrize(
    ("quantization", "package"),
    [("q4_0", "gguf"), ("int4", "torchao.quantization"), ("nf4", "bitsandbytes")],
)
def test_a_missing_package_is_named(
    quantization: str, package: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PatchError, match=f"pip install {package.split('.')[0]}"):
        both("dit", folders("dit"), student_quantization=quantization)
