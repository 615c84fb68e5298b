"""Training on a device: every family on a GPU, one on the CPU to try the tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.subjects import relative_error
from dmp_common import Patch
from tests.training.base.test_memory import config_of, gradients
from tests.training.conftest import Folders, Train
from tests.training.tinybases import TRAINED
from training.base.cheap import cheap_base
from training.base.frozen import load_frozen

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes", "q": "gguf"}
FORMS = ("q4_0", "q8_0", "fp8", "fp8-scaled", "int8", "int4", "nf4", "rtn3-group32")


def on_devices(*few: str) -> Any:
    """Marks a test for these families on the CPU, and for all that train on a GPU."""
    cases = [pytest.param("cpu", name, id=f"cpu-{name}") for name in few]
    cases += [pytest.param("cuda", name, id=f"cuda-{name}", marks=GPU) for name in TRAINED]
    return pytest.mark.parametrize(("device", "name"), cases)


@on_devices("dit")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision(
    device: str, name: str, precision: str, train: Train, request: pytest.FixtureRequest
) -> None:
    if device == "cpu" and precision == "fp16":
        pytest.skip("accelerate refuses fp16 on the CPU")
    chosen = ["--mixed_precision", precision, "--train_batch_size", "2", "--gate_noise"]
    out = train(name, *chosen, *(["--cpu"] if device == "cpu" else []))
    patch = Patch.load(next(Path(out).glob(f"tiny-{name}-dmp.safetensors")))
    values = [float(tensor.abs().max()) for tensor in patch.tensors().values()]
    assert all(math.isfinite(value) for value in values)
    assert max(values) > 0.0


@pytest.mark.filterwarnings("ignore")  # of torchao and bitsandbytes, which differ in releases
@pytest.mark.parametrize("form", FORMS)
@on_devices("dit")
def test_gradients_through_quantised_weights_are_those_of_the_cpu(
    device: str, name: str, form: str, folders: Folders
) -> None:
    for start, package in PACKAGES.items():
        if form.startswith(start):
            pytest.importorskip(package)
    found = {}
    for where in (device, "cpu"):
        config = config_of(name, folders(name), student_quantization=form)
        frozen = load_frozen(config).to(torch.device(where))
        found[where] = gradients(cheap_base(frozen, config), name)
    assert found[device].keys() == found["cpu"].keys()
    for key, value in found["cpu"].items():
        # Some formats compute their products in half precision on one of the two devices.
        assert relative_error(found[device][key].cpu(), value) < 5e-2 or not value.any(), key
