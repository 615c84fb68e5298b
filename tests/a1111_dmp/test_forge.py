"""Patches on Forge's and Forge Neo's own Flux with their layers for GGUF and nf4, in small.

WEBUI_PATH=...  the folder of one of them. Its own `gguf` must be the first that this process
                imports, so run this file by itself.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Patch, attach, bases, register_base
from dmp_common.tools.weighttypes import weight_types
from tests.randomness import randomise

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

FLUX = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 16,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
}


@pytest.fixture(scope="module")
def forge() -> SimpleNamespace:
    """Forge's modules."""
    path = Path(os.environ.get("WEBUI_PATH", ""))
    if not (path / "backend" / "nn" / "flux.py").is_file():
        pytest.skip("needs Forge's source: set WEBUI_PATH to its folder")
    before = sys.argv[:]
    sys.argv[1:] = ["--always-cpu", "--cpu"]  # Forge reads the first, Forge Neo the second
    packages = ("packages_3rdparty", "modules_forge/packages")  # of the one and of the other
    sys.path[:0] = [str(path), *(str(path / name) for name in packages)]
    try:
        names = ("nn.flux", "operations", "operations_gguf", "memory_management")
        parts = {name.replace("nn.", ""): _imported(f"backend.{name}") for name in names}
    finally:
        sys.argv[:] = before
    return SimpleNamespace(**parts)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs the Python packages of Forge: {error}")


def flux(forge: SimpleNamespace, few: str | None = None) -> nn.Module:
    """Forge's Flux, with layers that store their weights in a few bits."""
    operations = forge.operations.using_forge_operations
    with operations(device=torch.device("cpu"), dtype=torch.float32, bnb_dtype=few):
        return plain_flux(forge)


def plain_flux(forge: SimpleNamespace) -> nn.Module:
    """Forge's Flux with torch's layers; Forge Neo's takes more numbers."""
    build = forge.flux.IntegratedFluxTransformer2DModel
    more = {"patch_size": 2, "out_channels": 16}
    known = inspect.signature(build).parameters
    return build(**FLUX | {name: value for name, value in more.items() if name in known})


def plain_weights(forge: SimpleNamespace) -> dict[str, Tensor]:
    """Random weights of such a model."""
    state = plain_flux(forge).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.1 + (value.dim() == 1)
        for name, value in state.items()
    }


def in_gguf(forge: SimpleNamespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in Q4_0, and the values that its weights stand for."""
    gguf, stored = forge.operations_gguf.gguf, {}
    weights = plain_weights(forge)
    for name, value in weights.items():
        stored[name] = value
        if value.dim() == 2 and "blocks" in name:
            kind = gguf.GGMLQuantizationType.Q4_0
            few = gguf.quants.quantize(value.numpy(), kind)
            stored[name] = in_few(forge, few, kind, value.shape)
    model = flux(forge, "gguf")
    model.load_state_dict(stored, strict=False)
    forge.memory_management.bake_gguf_model(model)
    for name, layer in model.named_modules():
        if getattr(getattr(layer, "weight", None), "gguf_cls", None) is not None:
            values = forge.operations_gguf.dequantize_tensor(layer.weight)
            weights[f"{name}.weight"] = values.float()
    return model, weights


def in_few(forge: SimpleNamespace, few: Any, kind: Any, shape: torch.Size) -> nn.Parameter:
    """A weight as the host's loader makes it of a tensor in a GGUF file."""
    build = forge.operations_gguf.ParameterGGUF
    if "tensor_shape" in inspect.signature(build.__init__).parameters:  # Forge Neo
        return build(torch.from_numpy(few), tensor_type=kind, tensor_shape=shape)
    reader = SimpleNamespace(data=few, tensor_type=kind, shape=list(reversed(shape)))
    return build(reader)


def in_nf4(forge: SimpleNamespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in nf4, and the values that its weights stand for."""
    if not getattr(forge.operations, "bnb_avaliable", False):
        pytest.skip("needs Forge with bitsandbytes: Forge Neo uses that on a GPU alone")
    bitsandbytes = importlib.import_module("bitsandbytes")
    kind = _imported("backend.operations_bnb").ForgeLoader4Bit
    weights, model = plain_weights(forge), flux(forge, "nf4")
    model.load_state_dict(weights, strict=False)
    for name, layer in model.named_modules():
        if isinstance(layer, kind):  # a GPU does this on loading
            layer.weight = layer.weight._quantize(torch.device("cpu"))
            few = layer.weight.data, layer.weight.quant_state
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(*few)
    return model, weights


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, y = (
        torch.randn(2, *size, generator=generator) for size in ((16, 16, 16), (5, 16), (12,))
    )
    with torch.inference_mode():
        return model(x, torch.tensor([0.9, 0.3]), context=text, y=y)


@pytest.mark.parametrize("few", ["Q4_0", "NF4"])
def test_patches_act_on_what_the_stored_layers_compute(forge: SimpleNamespace, few: str) -> None:
    base = register_base(bases.flux("forge-flux", double=2, single=2, width=64, hub_id=None))
    model, weights = (in_gguf if few == "Q4_0" else in_nf4)(forge)
    other = plain_flux(forge)
    other.load_state_dict(weights)
    assert weight_types(model)[few] > 0.5 * sum(value.numel() for value in weights.values())
    patches = [randomise(Patch.create(base, mix="modulate"), 1, 0.02).eval()]
    patches.append(randomise(Patch.create(base), 2, 0.2).eval())
    before = run(model)
    assert (before - run(other)).norm() < 1e-4 * before.norm()
    for one in (model, other):
        for patch in patches:
            attach(one, patch)
    found, expected = run(model), run(other)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - before).norm() > 0.01 * before.norm()
