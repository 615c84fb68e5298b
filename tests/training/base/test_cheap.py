"""The cheap model beside the exact one: what differs, what is shared, what trains on it."""

from __future__ import annotations

import json
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
from training.methods.known import METHODS
from training.options.config import TrainConfig


def both(name: str, folder: Path, **options: object) -> tuple[FrozenBase, FrozenBase, TrainConfig]:
    """The exact base and its cheap form."""
    config = config_of(name, folder, **options)
    exact = load_frozen(config)
    return exact, cheap_base(exact, config), config


def output(frozen: FrozenBase, name: str) -> torch.Tensor:
    inputs = FAMILIES[name].inputs(torch.tensor([3.0, 500.0]), (8, 8), frozen.dtype, 0)
    result: torch.Tensor = frozen.model(**inputs).sample
    return result


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_linear_layers_of_the_blocks_are_rounded(name: str, folders: Folders) -> None:
    exact, cheap, _ = both(name, folders(name), student_quantization="rtn3")
    assert detect_base(cheap.model) is cheap.base is exact.base
    own, other = (dict(part.model.named_parameters()) for part in (exact, cheap))
    layers = linear_layers(exact.model)
    assert len(layers) >= 18
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
    with pytest.raises(PatchError, match="expected --student_quantization"):
        cheap_base(load_frozen(config), config)
