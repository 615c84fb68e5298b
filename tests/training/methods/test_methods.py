"""What is trained besides a gated patch: each method from the command line to its file."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

from dmp_common import Patch, PatchError, attach
from tests.tiny import FAMILIES
from tests.training.conftest import Folders, Train
from training.base.frozen import load_frozen
from training.evaluation.models import Spec, load_compared
from training.methods.known import METHODS
from training.methods.lora import LoraMethod
from training.methods.lora_ranks import ranks_at
from training.methods.method import Method
from training.options.config import TrainConfig
from training.options.model_options import Method as MethodName


def test_every_method_that_can_be_asked_for_is_whole() -> None:
    assert set(METHODS) == set(MethodName.__args__)
    for made in METHODS.values():
        assert isinstance(made, type) and issubclass(made, Method)
        assert not made.__abstractmethods__


def test_a_method_without_its_parts_cannot_be_made() -> None:
    class Half(Method):
        def trainable(self) -> dict[str, torch.nn.Parameter]:
            return {}

    with pytest.raises(TypeError, match="abstract"):
        Half(None)


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_lora(name: str, train: Train, folders: Folders) -> None:
    out = train(name, "--method", "lora", "--train_batch_size", "2", "--learning_rate", "0.01")
    path = out / f"tiny-{name}-lora.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    prefix = "unet." if name == "sd15" else "transformer."
    assert all(key.startswith(prefix) for key in tensors)
    size = sum(tensor.numel() for tensor in tensors.values())
    with torch.device("meta"):
        wanted = Patch.create(FAMILIES[name].base).saved_parameters
    rank = json.loads(header["lora_adapter_metadata"])[f"{prefix}r"]
    assert abs(size - wanted) <= size / rank / 2 + 1  # the nearest rank
    if name == "sd15":  # diffusers' own loader takes it, and it does something
        model = FAMILIES[name].model()
        before = FAMILIES[name].run(model)
        model.load_lora_adapter(tensors, prefix="unet")
        assert not torch.equal(FAMILIES[name].run(model), before)


def test_ranks_of_a_lora_fall_with_the_noise(folders: Folders, tmp_path: Path) -> None:
    """T-LoRA: the last ranks are off where there is much noise, in training and afterwards."""
    name = "dit"
    assert ranks_at(torch.tensor([0.0, 500.0, 999.0, 1000.0]), 8, 2).tolist() == [8, 5, 2, 2]
    options = {"method": "lora", "network_dim": 4, "network_min_dim": 1}
    path = str(folders(name))
    config = TrainConfig(base=f"tiny-{name}", pretrained_model_name_or_path=path, **options)
    frozen = load_frozen(config)

    def output(t: float) -> torch.Tensor:
        inputs = FAMILIES[name].inputs(torch.tensor([t]), (8, 8), frozen.dtype, 0)
        found: torch.Tensor = frozen.model(**inputs).sample.detach()
        return found

    before = output(900.0)
    method = LoraMethod(frozen, config)
    for matrix in method.trainable().values():
        torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(len(matrix)))
    saved = tmp_path / "t-lora.safetensors"
    method.save(saved, {}, torch.float32)
    trained = output(900.0)
    whole = output(0.0)
    for key, matrix in method.trainable().items():
        if "lora_A" in key:
            matrix.data[1:] = 0  # what is off at 900 changes nothing there, but without noise
    assert torch.equal(output(900.0), trained)
    assert not torch.equal(output(0.0), whole)
    method.remove()
    assert torch.equal(output(900.0), before)
    with load_compared(Spec("t", "lora", str(saved))).on(frozen):
        assert torch.equal(output(900.0), trained)
    assert torch.equal(output(900.0), before)
    with pytest.raises(PatchError, match="network_min_dim of at most"):
        LoraMethod(frozen, config.model_copy(update={"network_min_dim": 5}))


@pytest.mark.parametrize("name", ["dit"])
def test_full(name: str, train: Train, folders: Folders) -> None:
    out = train(name, "--method", "full", "--train_batch_size", "2", "--learning_rate", "1e-3")
    part = "unet" if name == "sd15" else "transformer"
    cls = type(FAMILIES[name].model())
    trained = cls.from_pretrained(out / f"tiny-{name}-full", subfolder=part)
    base = cls.from_pretrained(folders(name), subfolder=part)
    moved = [
        key
        for key, value in trained.state_dict().items()
        if not torch.equal(value, base.state_dict()[key])
    ]
    assert len(moved) > len(base.state_dict()) / 2
    diffusers.DDIMScheduler.from_pretrained(out / f"tiny-{name}-full", subfolder="scheduler")
    if name == "dit":  # one time embedding for all blocks, as the gate takes it for granted
        first, last = (trained.transformer_blocks[n].norm1.emb for n in (0, 2))
        for value, other in zip(first.parameters(), last.parameters(), strict=True):
            assert torch.equal(value, other)


def test_joint_trains_the_weights_and_a_patch(train: Train, folders: Folders) -> None:
    """As in training from scratch with DMP: both move, and the folder holds both."""
    out = train("dit", "--method", "joint", "--train_batch_size", "2", "--learning_rate", "1e-3")
    folder = out / "tiny-dit-joint"
    cls = type(FAMILIES["dit"].model())
    trained = cls.from_pretrained(folder, subfolder="transformer")
    base = cls.from_pretrained(folders("dit"), subfolder="transformer").state_dict()
    moved = [
        key for key, value in trained.state_dict().items() if not torch.equal(value, base[key])
    ]
    assert len(moved) > len(base) / 2
    patch = Patch.load(folder / "patch.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())
    before = FAMILIES["dit"].run(trained)
    with attach(trained, patch):
        assert not torch.equal(FAMILIES["dit"].run(trained), before)


def test_prompt_tuning_has_no_gate(train: Train) -> None:
    out = train("sd15", "--method", "prompt")
    patch = Patch.load(out / "tiny-sd15-prompt.safetensors")
    assert patch.variant.gate == "none"
    assert all(name.startswith("prompts.") for name in patch.tensors())
