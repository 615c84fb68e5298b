"""Attaching a patch: together with what else people do to a model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn as nn

from dmp_common import PatchError, attach, attached, detach
from tests.dmp_common.attaching import DIT, FLUX, SD15, alone, close, make, some
from tests.tiny import FAMILIES, Tiny

SOME = (SD15, DIT, FAMILIES["sd3"], FLUX)


def lora(model: nn.Module) -> nn.Module:
    """The model with a random LoRA on its attention projections, unmerged."""
    peft = pytest.importorskip("peft")
    if not hasattr(model, "add_adapter"):
        pytest.skip("diffusers has no adapters for this model")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter(config)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@some(*SOME)
def test_adapters_of_peft_added_before_and_after(tiny: Tiny, when: str) -> None:
    patch = make(tiny)
    adapted = lora(tiny.model())
    base, plain = tiny.run(adapted), tiny.run(tiny.model())
    with attach(adapted, patch):
        both = tiny.run(adapted)
    model = tiny.model()
    if when == "before":
        lora(model)
    with attach(model, patch):
        if when == "after":
            lora(model)
        assert torch.equal(tiny.run(model), both)
        model.fuse_lora()
        assert close(tiny.run(model), both, 1e-4)
        model.unfuse_lora()
        model.disable_adapters()
        assert close(tiny.run(model), alone(tiny, patch), 1e-4)
        model.enable_adapters()
        assert close(tiny.run(model), both, 1e-4)
        model.unload_lora()
        assert close(tiny.run(model), alone(tiny, patch), 1e-4)
    assert close(tiny.run(model), plain, 1e-4)
    assert not close(base, plain, 1e-3)


@some(DIT)
def test_a_model_inside_of_peft(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True)
    wrapped = peft.get_peft_model(tiny.model(), config).eval()
    patch = make(tiny)
    with attach(wrapped, patch):
        assert close(tiny.run(wrapped), alone(tiny, patch), 1e-5)
        assert len(attached(wrapped)) == 1
    assert close(tiny.run(wrapped), tiny.run(tiny.model()), 1e-5)


def group_offload(model: nn.Module) -> None:
    if not getattr(model, "_supports_group_offloading", False):
        pytest.skip("diffusers has no group offload for this model")
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")


def sequential_offload(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [group_offload, sequential_offload])
@some(*SOME)
def test_offloaded_weights(tiny: Tiny, offload: Callable[[nn.Module], None], when: str) -> None:
    """Group offload comes and goes with diffusers' hooks, sequential offload with accelerate's."""
    patch = make(tiny)
    expected, base = alone(tiny, patch), tiny.run(tiny.model())
    model = tiny.model()
    if when == "before":
        offload(model)
    with attach(model, patch), torch.no_grad():
        if when == "after":
            offload(model)
        for _ in range(2):
            assert torch.equal(tiny.run(model), expected)
    with torch.no_grad():
        assert torch.equal(tiny.run(model), base)


@pytest.mark.parametrize("when", ["before", "after"])
@some(*SOME)
def test_weights_stored_in_eight_bits(tiny: Tiny, when: str) -> None:
    """The model computes in float32 and stores float8: the patch sees what it computes."""
    model = tiny.model()
    if not hasattr(model, "enable_layerwise_casting"):
        pytest.skip("this release of diffusers has no layerwise casting")

    def cast(model: nn.Module) -> None:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    patch = make(tiny)
    rounded = tiny.model()
    with torch.no_grad():
        cast(rounded)
        base = tiny.run(rounded)
        if when == "before":
            cast(model)
        with attach(model, patch):
            if when == "after":
                cast(model)
            found = tiny.run(model)
            assert torch.equal(tiny.run(model), found)
        assert torch.equal(tiny.run(model), base)
        change, exact = found - base, alone(tiny, patch) - tiny.run(tiny.model())
    assert (change - exact).norm() < 0.5 * exact.norm()


@pytest.mark.filterwarnings("ignore:.*(quantization|quantize).*deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@some(SD15, DIT)
def test_dynamically_quantised_linear_layers(tiny: Tiny) -> None:
    quantise = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no engine for 8 bits")
    patch = make(tiny)
    model = quantise(tiny.model(), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        base = tiny.run(model)
        with attach(model, patch):
            found = tiny.run(model)
            assert close(found, alone(tiny, patch), 0.1)
            assert not close(found, base, 0.02)
        assert torch.equal(tiny.run(model), base)


@pytest.fixture
def process_group():
    """One process, as a whole group."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@some(DIT)
def test_distributed_data_parallel_is_unwrapped(tiny: Tiny, process_group: None) -> None:
    patch = make(tiny)
    wrapped = nn.parallel.DistributedDataParallel(tiny.model().requires_grad_(True))
    with attach(wrapped, patch), torch.no_grad():
        assert close(tiny.run(wrapped), alone(tiny, patch), 1e-6)
        assert len(attached(wrapped)) == len(attached(wrapped.module)) == 1
    with pytest.raises(PatchError, match="found one in DataParallel"):
        attach(nn.DataParallel(tiny.model()), patch)


@some(DIT)
def test_a_model_prepared_by_accelerate(tiny: Tiny) -> None:
    accelerate = pytest.importorskip("accelerate")
    patch = make(tiny).train()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(
        tiny.model(), torch.optim.SGD(patch.parameters(), lr=0.1)
    )
    with attach(model, patch):
        before = tiny.run(model)
        accelerator.backward(before.square().mean())
        optimizer.step()
        assert not close(tiny.run(model), before, 1e-6)
    accelerator.free_memory()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def six_blocks() -> Tiny:
    import dataclasses

    import diffusers

    from dmp_common import bases, register_base

    base = register_base(bases.flux("tiny-six", double=3, single=3, width=32, hub_id=None))

    def build() -> nn.Module:
        return diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 6, 6),
        )

    return dataclasses.replace(FLUX, name="six", base=base, build=build)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_repeated_blocks_have_the_graphs_of_the_plain_model(when: str, dynamo: None) -> None:
    tiny = six_blocks()
    patch, plain, model = make(tiny), tiny.model(), tiny.model()
    if not hasattr(plain, "compile_repeated_blocks"):
        pytest.skip("this release of diffusers cannot compile block by block")
    expected = alone(tiny, patch)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        plain.compile_repeated_blocks(fullgraph=True, backend="eager")
        base = tiny.run(plain)
        count = graphs()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if when == "after":
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            assert torch.equal(tiny.run(model), base)
        with attach(model, patch) as attachment:
            if when == "before":
                model.compile_repeated_blocks(fullgraph=True, backend="eager")
            assert close(tiny.run(model), expected, 1e-5)
            assert graphs() == count > 0
            with torch._dynamo.config.patch(error_on_recompile=True):
                attachment.strength = 0.3
                weak = tiny.run(model)
                attachment.schedule = [(0.0, 1.0), (1.0, 0.0)]
                assert not torch.equal(tiny.run(model), weak)
                assert not close(weak, expected, 1e-3)
        assert torch.equal(tiny.run(model), base)
        assert graphs() == count


@pytest.mark.slow
@some(DIT)
def test_a_plain_graph_of_another_model_serves_no_patched_one(tiny: Tiny, dynamo: None) -> None:
    """The compiler shares graphs between models of a class, and does not look at hooks."""
    one, two = make(tiny, 1), make(tiny, 2)
    with torch.no_grad():
        plain = torch.compile(tiny.model(), backend="eager", dynamic=False)
        base = tiny.run(plain)
        model = tiny.model()
        with attach(model, copy.deepcopy(one)), attach(model, copy.deepcopy(two)):
            both = tiny.run(model)
        attach(model, one)
        compiled = torch.compile(model, backend="eager", dynamic=False)
        assert close(tiny.run(compiled), alone(tiny, one), 1e-5)
        second = tiny.model()
        attach(second, one)
        attach(second, two)
        assert close(tiny.run(torch.compile(second, backend="eager", dynamic=False)), both, 1e-5)
        detach(model)
        assert torch.equal(tiny.run(compiled), base)
        assert torch.equal(tiny.run(plain), base)
