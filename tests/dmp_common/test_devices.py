"""Patches on a device: every family on a GPU, one of each kind on the CPU to try the tests.

On the CPU the same bodies run, so that a test is not seen for the first time where a GPU is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.gpu.numbers import captured
from benchmarks.gpu.subjects import relative_error
from benchmarks.models import placed
from dmp_common import Patch, Schedule, attach
from tests.tiny import FAMILIES, Tiny

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
MIXES = ("add", "modulate")
TIMESTEPS = torch.tensor([10.0, 900.0])


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference of the comparisons float32 must mean float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_devices(*few: str, gpu: Iterable[str] = FAMILIES) -> Any:
    """Marks a test for these families on the CPU, and for all families or some on a GPU."""
    cases = [pytest.param("cpu", name, id=f"cpu-{name}") for name in few]
    cases += [pytest.param("cuda", name, id=f"cuda-{name}", marks=GPU) for name in gpu]
    return pytest.mark.parametrize(("device", "name"), cases)


def soft(family: Tiny, mix: str) -> Patch:
    """A random patch of moderate size, as a trained one is."""
    patch = family.patch(0, std=0.05 if mix == "modulate" else 0.5, mix=mix)
    with torch.no_grad():
        for parameter in patch.gate.parameters():
            parameter.mul_(0.2)
    return patch


def runner(family: Tiny, model: nn.Module, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call of a tiny model on a device: its output in float32."""
    inputs = placed(family.inputs(TIMESTEPS, (8, 8), dtype, 1), device, dtype)

    def run() -> Tensor:
        with torch.no_grad():
            return family.call(model, inputs).float()

    return run


def case(
    device: str, name: str, mix: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Patch, Callable[[], Tensor]]:
    """A tiny model and a patch on a device, and a call of the model."""
    family = FAMILIES[name]
    model = family.model(dtype=dtype).to(device)
    return model, soft(family, mix).to(device), runner(family, model, device, dtype)


@on_devices("sd15", "dit", "flux")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_as_without_a_patch(
    device: str, name: str, mix: str, dtype: torch.dtype
) -> None:
    model, patch, run = case(device, name, mix)
    plain = run()
    with attach(model, patch):
        patched = run()
    assert relative_error(patched, plain) > 0.01
    model, patch, run = case(device, name, mix, dtype)
    try:
        alone = relative_error(run(), plain)
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        pytest.skip("this release of torch has no float16 on the CPU")
    with attach(model, patch):
        assert relative_error(run(), patched) <= 3.0 * alone + 2e-3


@on_devices("sd15", "dit", "flux")
@pytest.mark.parametrize("mix", MIXES)
def test_device_equals_the_cpu_and_gives_the_base_back(device: str, name: str, mix: str) -> None:
    model, patch, run = case(device, name, mix)
    plain = run()
    with attach(model, patch, strength=0.0):
        assert torch.equal(run(), plain)
    with attach(model, patch):
        patched = run()
        assert torch.equal(run(), patched)  # from the cache
    assert torch.equal(run(), plain)
    other, same, on_cpu = case("cpu", name, mix)
    with attach(other, same):
        assert relative_error(patched.cpu(), on_cpu()) < 1e-3
    with attach(model, soft(FAMILIES[name], mix)):  # the patch stays on the CPU
        assert relative_error(run(), patched) < 1e-4


# Of torch's compiler: that float32 could be faster, and that complex numbers could.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:Torchinductor does not")
# On the CPU test_attach_compile.py has more. A UNet takes half a minute to compile.
@on_devices(gpu=("sd15", "dit", "sd3", "flux", "qwen-image"))
@pytest.mark.parametrize("mix", MIXES)
def test_compiled_model_follows_new_settings(device: str, name: str, mix: str) -> None:
    torch._dynamo.reset()
    model, patch, _ = case(device, name, mix)
    attachment = attach(model, patch)
    run = runner(FAMILIES[name], model, device, torch.float32)
    expected = run()
    backend = "inductor" if device == "cuda" else "eager"
    compiled: Any = torch.compile(model, dynamic=False, backend=backend)
    fast = runner(FAMILIES[name], compiled, device, torch.float32)
    assert relative_error(fast(), expected) < 1e-3
    with torch._dynamo.config.patch(error_on_recompile=True):
        attachment.strength = 0.5
        weaker = fast()
        attachment.schedule = Schedule(first=100.0)
        outside = fast()
    assert not torch.equal(weaker, expected)
    assert not torch.equal(outside, weaker)
    attachment.remove()


@on_devices("sd15", "sd3")
@pytest.mark.parametrize("mix", MIXES)
def test_weights_that_come_block_by_block(device: str, name: str, mix: str) -> None:
    model, patch, run = case(device, name, mix)
    with attach(model, patch):
        expected = run()
    module: Any = model.to("cpu")
    if not getattr(module, "_supports_group_offloading", False):
        pytest.skip("this release of diffusers does not offload this class in groups")
    module.enable_group_offload(
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=device == "cuda",
    )
    plain = run()
    with attach(model, patch):
        assert relative_error(run(), expected) < 1e-3
    assert torch.equal(run(), plain)


@on_devices("sd15", "sd3")
@pytest.mark.parametrize("mix", MIXES)
def test_weights_that_are_stored_as_fp8(device: str, name: str, mix: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, patch, run = case(device, name, mix, dtype)
    plain = run()
    with attach(model, patch):
        patched = run()
    module: Any = model
    if not hasattr(module, "enable_layerwise_casting"):
        pytest.skip("this release of diffusers does not store weights in fp8")
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    cast = run()
    alone = relative_error(cast, plain)
    with attach(model, patch):
        assert relative_error(run(), patched) <= 3.0 * alone + 1e-3
    assert torch.equal(run(), cast)


# Of torch, where a matrix product is the first work of a thread on the device.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@on_devices("dit")
@pytest.mark.parametrize("mix", MIXES)
def test_threads_do_not_see_each_others_calls(device: str, name: str, mix: str) -> None:
    model, patch, run = case(device, name, mix)
    with attach(model, patch):
        expected = run()
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(relative_error(each, expected) < 1e-5 for each in found)


@on_devices("sd15", "dit", "flux")
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_the_cpu(device: str, name: str, mix: str) -> None:
    found = {}
    for where in (device, "cpu"):
        family = FAMILIES[name]
        model, patch = family.model().to(where), soft(family, mix).to(where).train()
        inputs = placed(family.inputs(TIMESTEPS, (8, 8), torch.float32, 1), where, torch.float32)
        with attach(model, patch):
            family.call(model, inputs).square().mean().backward()
        found[where] = {n: p.grad.cpu() for n, p in patch.named_parameters() if p.grad is not None}
    assert found[device].keys() == found["cpu"].keys()
    assert found["cpu"]
    for key, value in found["cpu"].items():
        assert relative_error(found[device][key], value) < 1e-2 or not value.any(), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_graph_of_a_patched_model(name: str, mix: str) -> None:
    model, patch, run = case("cuda", name, mix)
    try:
        plain = captured(run)
    except RuntimeError as error:
        pytest.skip(f"the plain model cannot be captured: {str(error).splitlines()[0]}")
    assert relative_error(plain, run()) < 1e-5
    with attach(model, patch):
        expected = run()
        assert relative_error(captured(run), expected) < 1e-5
