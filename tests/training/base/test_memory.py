"""A base in less memory: the patch is trained as on the weights that are left."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.models import placed
from dmp_common import Patch, PatchError, attach
from tests.tiny import FAMILIES
from tests.training.conftest import Folders, Train
from training.base import memory
from training.base.frozen import FrozenBase, base_kind, load_frozen
from training.options.command_line import resolve
from training.options.config import TrainConfig

CPU = torch.device("cpu")


def config_of(name: str, folder: Path, **options: object) -> TrainConfig:
    given = {"base": FAMILIES[name].base.name, "pretrained_model_name_or_path": str(folder)}
    if any(name.startswith("student_") for name in options):
        given["objective"] = "distill"
    return resolve({**given, **options})


def gradients(frozen: FrozenBase, name: str, checkpointing: bool = False) -> dict[str, Tensor]:
    """Of a patch of random values, for one batch."""
    torch.manual_seed(1)
    model = frozen.model
    patch = Patch.create(frozen.base, prompt_init="random", gate_init="random", **frozen.facts)
    if checkpointing:
        frozen.enable_gradient_checkpointing()
    device = next(model.parameters()).device
    patch.to(device)
    inputs = FAMILIES[name].inputs(torch.tensor([3.0, 500.0]), (8, 8), frozen.dtype, 0)
    with attach(model, patch):
        output = FAMILIES[name].call(model, placed(inputs, device, frozen.dtype))
        output.float().square().mean().backward()
    return {key: value.grad for key, value in patch.named_parameters()}


def rounded(frozen: FrozenBase, like: FrozenBase) -> FrozenBase:
    """A base whose weights are rounded as those of another are stored."""
    stored = {
        name.replace("parametrizations.weight.original", "weight"): value
        for name, value in like.model.named_parameters()
    }
    for name, value in frozen.model.named_parameters():
        if stored[name].dtype == memory.STORED:
            value.data = value.data.to(memory.STORED).to(value.dtype)
    return frozen


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, True) for name in ("sd15", "dit", "pixart", "sd3", "flux", "flux2")),
        ("flux", False),
    ],
)
def test_gradients_on_fp8_weights_are_those_on_rounded_weights(
    name: str, checkpointing: bool, folders: Folders
) -> None:
    """Of every layer, convolutions and norms too, also where a block is computed twice."""
    frozen = load_frozen(config_of(name, folders(name), fp8_base=True, mixed_precision="bf16"))
    plain = load_frozen(config_of(name, folders(name), mixed_precision="bf16"))
    stored = [value.dtype for value in frozen.model.parameters()]
    assert stored.count(memory.STORED) > len(stored) / 4
    assert frozen.dtype == torch.bfloat16
    plain = rounded(plain, frozen)
    found = gradients(frozen, name, checkpointing)
    expected = gradients(plain, name, checkpointing)
    assert any(bool(value.any()) for value in expected.values())
    assert [value.dtype for value in frozen.model.parameters()] == stored  # after the step too
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_time_embedding_keeps_its_precision(folders: Folders) -> None:
    """The gate sees it, also when it is computed by itself."""
    for name in ("pixart", "flux"):
        frozen = load_frozen(config_of(name, folders(name), fp8_base=True))
        time = frozen.model.get_submodule(frozen.base.times[frozen.naming].mlp)
        assert {value.dtype for value in time.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_training_on_fp8_weights(name: str, train: Train) -> None:
    """From data to file, with the balancing losses, which call the time embedding by itself."""
    options = ["--fp8_base", "--mixed_precision", "bf16", "--importance_weight", "0.1"]
    out = train(name, *options, "--gradient_checkpointing")
    patch = Patch.load(out / f"tiny-{name}-dmp.safetensors")
    assert any(bool(tensor.any()) for tensor in patch.tensors().values())


@pytest.mark.parametrize(("name", "count"), [("flux", 3), ("wan", 2)])
def test_a_swapped_block_gives_the_same_gradients(name: str, count: int, folders: Folders) -> None:
    """The weights of swapped blocks are there while the block computes, and at no other time: here
    they are nan otherwise, which a backward pass that kept a parameter would show."""
    if name not in FAMILIES:
        pytest.skip("this release of diffusers does not know it")
    config = config_of(name, folders(name), blocks_to_swap=count)
    frozen, plain = load_frozen(config), load_frozen(config)
    blocks = frozen.swapped_blocks
    assert len(blocks) == count
    for block in blocks:
        away(block)
    found = gradients(frozen, name, checkpointing=True)
    assert all(bool(p.isnan().all()) for block in blocks for p in block.parameters())
    expected = gradients(plain, name, checkpointing=True)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def away(block: nn.Module) -> None:
    """What `memory.swap` does on a GPU: the weights are there while the block computes, only."""
    memory.alias_weights(block)
    values = {parameter: parameter.data for parameter in block.parameters()}
    empty = {parameter: torch.full_like(parameter, torch.nan) for parameter in values}

    def give(source: dict[nn.Parameter, Tensor]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            for parameter, value in source.items():
                parameter.data = value

        return hook

    give(empty)()
    block.register_forward_pre_hook(give(values))
    block.register_forward_hook(give(empty))


def test_swapping_leaves_the_blocks_where_they_are(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else moves, here to the meta device; each block becomes a group of its own."""
    given: list[tuple[nn.Module, dict[str, object]]] = []
    monkeypatch.setattr(
        memory, "apply_group_offloading", lambda holder, **options: given.append((holder, options))
    )
    frozen = load_frozen(config_of("flux", folders("flux"), blocks_to_swap=2))
    blocks = frozen.swapped_blocks
    frozen.vae = None
    frozen.encoders = {}
    frozen.to(torch.device("meta"))
    staying = {id(p) for block in blocks for p in block.parameters()}
    for parameter in frozen.model.parameters():
        assert parameter.device.type == ("cpu" if id(parameter) in staying else "meta")
    (holder, options) = given[0]
    assert list(holder["blocks"]) == blocks
    assert options["num_blocks_per_group"] == 1
    assert options["onload_device"] == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fp8", [False, True])
def test_swapped_blocks_on_a_gpu(fp8: bool, folders: Folders) -> None:
    config = config_of("flux", folders("flux"), blocks_to_swap=3, fp8_base=fp8)
    gpu = torch.device("cuda")
    frozen = load_frozen(config).to(gpu)
    plain = load_frozen(config.model_copy(update={"blocks_to_swap": None})).to(gpu)
    blocks = frozen.swapped_blocks
    found = gradients(frozen, "flux", checkpointing=True)
    assert {p.device.type for block in blocks for p in block.parameters()} == {"cpu"}
    for key, value in gradients(plain, "flux", checkpointing=True).items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-9), key


@pytest.mark.parametrize(("name", "count"), [("flux", 4), ("sd3", 3), ("dit", 2), ("pixart", 3)])
def test_blocks_that_can_be_swapped(name: str, count: int, folders: Folders) -> None:
    """Not the one with the time embedding, which is called by itself; more is all there are."""
    frozen = load_frozen(config_of(name, folders(name), blocks_to_swap=9))
    assert len(frozen.swapped_blocks) == count
    assert list(frozen.to(CPU).model.parameters())[0].device == CPU


def test_bytes_of_weights(folders: Folders) -> None:
    plain = load_frozen(config_of("flux", folders("flux")))
    total = memory.weight_bytes([plain.model])
    assert total == memory.WeightBytes(4 * sum(p.numel() for p in plain.model.parameters()), 0)
    small = load_frozen(config_of("flux", folders("flux"), fp8_base=True))
    stored = sum(p.numel() for p in small.model.parameters() if p.dtype == memory.STORED)
    assert memory.weight_bytes([small.model]).device == total.device - 3 * stored
    swapped = load_frozen(config_of("flux", folders("flux"), blocks_to_swap=2))
    found = memory.weight_bytes([swapped.model], swapped.swapped_blocks)
    single = 4 * sum(p.numel() for p in swapped.model.single_transformer_blocks[0].parameters())
    assert found == memory.WeightBytes(total.device - single, 2 * single)  # one is on the device


def test_the_estimate_follows_the_options(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("flux", "--dry_run", "--blocks_to_swap", "2", "--gradient_checkpointing")
    assert "GiB of weights stay in the memory of the CPU" in capsys.readouterr().out
    train("flux", "--dry_run")
    assert "stay in the memory of the CPU" not in capsys.readouterr().out


def test_options_that_save_memory_are_checked_at_once(folders: Folders) -> None:
    config = config_of(
        "sd15", folders("sd15"), fp8_base=True, int8_base=True, blocks_to_swap=2, method="full",
        torch_compile=True, fsdp=True,
    )  # fmt: skip
    for load in (load_frozen, base_kind):
        with pytest.raises(PatchError) as caught:
            load(config)
        lines = str(caught.value).splitlines()
        assert [line.split(",")[0] for line in lines] == [
            "expected --method dmp or prompt with --fp8_base and --int8_base and --blocks_to_swap",
            "expected no --fsdp with --fp8_base and --int8_base and --blocks_to_swap",
            "expected no --torch_compile with --fp8_base and --int8_base and --blocks_to_swap",
            "expected --int8_base alone",
            "expected a transformer with --blocks_to_swap",
        ]


def test_warnings_about_memory(folders: Folders) -> None:
    config = config_of("flux", folders("flux"), blocks_to_swap=9, fp8_base=True)
    told = memory.memory_warnings(config, 4, CPU)
    assert [line.split(" ")[0] for line in told] == [
        "--blocks_to_swap", "--blocks_to_swap", "--blocks_to_swap", "--fp8_base",
    ]  # fmt: skip
    student = config_of("flux", folders("flux"), student_quantization="fp8")
    assert "--student_quantization fp8 saves little" in memory.memory_warnings(student, 4, CPU)[0]
    quiet = config_of("flux", folders("flux"), blocks_to_swap=3, gradient_checkpointing=True)
    assert memory.memory_warnings(quiet, 4, torch.device("cuda")) == []


def test_int8_needs_torchao(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(PatchError, match="expected the package torchao for --int8_base"):
        load_frozen(config_of("flux", folders("flux"), int8_base=True))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.filterwarnings("ignore")  # torchao's own, which differ between releases
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("sd15", True), ("dit", False), ("flux", True)]
)
def test_gradients_on_int8_weights_are_those_on_rounded_weights(
    name: str, checkpointing: bool, folders: Folders
) -> None:
    frozen = load_frozen(config_of(name, folders(name), int8_base=True))
    plain = load_frozen(config_of(name, folders(name)))
    stored = dict(frozen.model.named_parameters())
    changed = 0
    for key, value in plain.model.named_parameters():
        if hasattr(stored[key], "dequantize") and type(stored[key]) is not nn.Parameter:
            value.data = stored[key].dequantize().to(value.dtype)
            changed += 1
    assert changed > 20
    found = gradients(frozen, name, checkpointing)
    for key, value in gradients(plain, name, checkpointing).items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    time = frozen.model.get_submodule(frozen.base.times[frozen.naming].mlp)
    assert all(type(value) is nn.Parameter for value in time.parameters())
    before = memory.weight_bytes([copy.deepcopy(plain.model)]).device
    assert memory.weight_bytes([frozen.model]).device < 0.8 * before  # convolutions stay
