"""Patches on quantised models, as ComfyUI and ComfyUI-GGUF hold them, against diffusers.

COMFYUI_GGUF_PATH=...  ComfyUI-GGUF's folder (github.com/city96/ComfyUI-GGUF), besides COMFYUI_PATH.
COMFYUI_NF4_PATH=...   ComfyUI_bitsandbytes_NF4's folder (github.com/comfyanonymous), likewise.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dmp_common import Base, attach
from dmp_common.patch.serialize import use_of
from dmp_common.tools.weighttypes import weight_types

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]

FEW = torch.float8_e4m3fn


def loaded(variable: str, name: str, package: str) -> ModuleType:
    """A pack of nodes from the folder that a variable names, as ComfyUI loads it."""
    root = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not (root / "__init__.py").is_file():
        pytest.skip(f"needs the source of a pack of nodes: set {variable} to its folder")
    pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pack(comfyui_path: Path) -> ModuleType:
    """ComfyUI-GGUF."""
    module = loaded("COMFYUI_GGUF_PATH", "comfyui_gguf", "gguf")
    for part in ("ops", "dequant", "nodes"):
        setattr(module, part, sys.modules[f"comfyui_gguf.{part}"])
    return module


@pytest.fixture(scope="module")
def nf4_pack(comfyui_path: Path) -> ModuleType:
    """ComfyUI_bitsandbytes_NF4."""
    return loaded("COMFYUI_NF4_PATH", "comfyui_nf4", "bitsandbytes")


def stored(pack: ModuleType, value: Tensor) -> Tensor:
    """A tensor in Q4_0, as ComfyUI-GGUF's loader makes it."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    few = torch.from_numpy(gguf.quants.quantize(value.contiguous().numpy(), kind))
    return pack.ops.GGMLTensor(few, tensor_type=kind, tensor_shape=value.shape)


def rounded(pack: ModuleType, base: Base, model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Weights whose linear layers went through Q4_0, and their names, as diffusers has them.

    The pack multiplies what it stores in half precision.
    """
    state = dict(model.state_dict())
    names = {f"{site.paths['diffusers']}.weight" for site in base.select("linear", "output")}
    names = {name for name in names if state[name].shape[1] % 32 == 0}  # whole blocks
    for name in names:
        state[name] = pack.dequant.dequantize_tensor(stored(pack, state[name]), torch.float32)
    return state, names


def model_with(family: Any, operations: Any, weights: dict[str, Tensor]) -> Any:
    """A `ModelPatcher` of ComfyUI's model, with a pack's layers and these weights."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)(dict(family.unet))
    config.custom_operations = operations
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(weights, strict=False)
    model.diffusion_model.requires_grad_(False).eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def gguf_model(pack: ModuleType, family: Any, exact: dict[str, Tensor], names: set[str]) -> Any:
    """ComfyUI's model with ComfyUI-GGUF's layers, whose weights are stored in Q4_0."""
    few = set(family.convert({name: exact[name] for name in names}))
    weights = {
        name: stored(pack, value) if name in few else value
        for name, value in family.convert(exact).items()
    }
    return pack.nodes.GGUFModelPatcher.clone(model_with(family, pack.ops.GGMLOps(), weights))


def in_diffusers(family: Any, patcher: Any, state: dict[str, Tensor], patches: list[Any]):
    """The plain and the patched denoised latents of the diffusers twin with these weights."""
    twin = family.diffusers()
    twin.load_state_dict(state)
    sampling, base = patcher.model.model_sampling, family.base
    sigmas = torch.tensor([float(sampling.percent_to_sigma(p)) for p in (0.2, 0.6)])
    x, text, pooled = family.inputs(2)
    x = x * sigmas.reshape(-1, *[1] * (x.dim() - 1)).clamp(max=15)
    timesteps = base.times["ldm"].timesteps(sampling.timestep(sigmas).float())
    arguments = family.call(sampling.calculate_input(sigmas, x), timesteps, text, pooled)
    outs = []
    with torch.inference_mode():
        for chosen in ([], patches):
            attachments = [attach(twin, patch) for patch in chosen]
            out = family.unpack(family.run(twin, arguments), tuple(x.shape[2:]))
            outs.append(sampling.calculate_denoised(sigmas, out, x))
            for attachment in attachments:
                attachment.remove()
    return sigmas, *outs


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen-image", "z-image"])
def test_gguf_models_as_in_diffusers(real, run, host, pack, name):
    """Two patches, one that modulates and one that adds: the layers stay as they are stored."""
    family = real.FAMILIES.get(name) or pytest.skip("this release of diffusers does not know it")
    exact = dict(family.diffusers().state_dict())
    state, names = rounded(pack, family.base, family.diffusers())
    patcher = gguf_model(pack, family, exact, names)
    types = weight_types(patcher.model.diffusion_model)
    assert types["Q4_0"] >= sum(state[name].numel() for name in names)
    assert set(types) == {"Q4_0", "F32"}
    patches = [family.patch(1, 0.2, mix="modulate"), family.patch(2, 0.2)]
    sigmas, plain, expected = in_diffusers(family, patcher, state, patches)
    assert (run.call(patcher, family, sigmas) - plain).norm() < 1e-4 * plain.norm()
    patched = patcher
    for patch in patches:
        patched = host.attach(patched, run.record(patch))
    found = run.call(patched, family, sigmas)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (expected - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_fp8_models_as_in_diffusers(real, run, host, name):
    family = real.FAMILIES[name]
    patcher = family.comfy(dtype=FEW)
    found = {k: v.float() for k, v in patcher.model.diffusion_model.state_dict().items()}
    state = {k: v.to(FEW).float() for k, v in family.diffusers().state_dict().items()}
    assert all(torch.equal(found[k], v) for k, v in family.convert(state).items() if k in found)
    patches = [family.patch(1, 0.2, mix="modulate")]
    sigmas, _, expected = in_diffusers(family, patcher, state, patches)
    out = run.call(host.attach(patcher, run.record(patches[0])), family, sigmas)
    assert (out - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_nf4_models_as_their_values(real, run, host, nf4_pack, name):
    """As ComfyUI's own layers with the values that the stored ones stand for."""
    import bitsandbytes

    family, sigmas = real.FAMILIES[name], torch.tensor([0.3, 0.7])
    nf4_pack.current_bnb_dtype = "nf4"
    patcher = model_with(family, nf4_pack.OPS, family.convert(family.diffusers().state_dict()))
    values = {}
    for path, layer in patcher.model.diffusion_model.named_modules():
        if isinstance(layer, nf4_pack.ForgeLoader4Bit):  # on a GPU the first call does this
            layer.weight = layer.weight._quantize(torch.device("cpu"))
            layer.quant_state = layer.weight.quant_state
            few = layer.weight.data, layer.quant_state
            values[f"{path}.weight"] = bitsandbytes.functional.dequantize_4bit(*few)
    assert weight_types(patcher.model.diffusion_model)["NF4"] == sum(
        value.numel() for value in values.values()
    )
    plain = family.comfy()
    plain.model.diffusion_model.load_state_dict(values, strict=False)
    patches = [family.patch(1, 0.2, mix="modulate"), family.patch(2, 0.2)]
    before = run.call(patcher, family, sigmas)
    for patch in patches:
        patcher, plain = (host.attach(one, run.record(patch)) for one in (patcher, plain))
    found, expected = (run.call(one, family, sigmas) for one in (patcher, plain))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - before).norm() > 0.01 * before.norm()


def test_a_repair_patch_says_on_which_model_it_is(real, run, host, caplog):
    family = real.FAMILIES["sd15"]
    patch = family.patch(mix="modulate")
    patch.metadata["dmp.use"] = json.dumps({"cheap": {"types": {"F8_E4M3": 99, "F16": 1}}})
    with caplog.at_level(logging.WARNING):
        host.attach(family.comfy(dtype=FEW), run.record(patch))
        assert caplog.records == []
        host.attach(family.comfy(), run.record(patch))
    assert "weights in F8_E4M3 (99%), and this one has them in F32 (100%)" in caplog.text


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_scaled_fp8_files_as_their_values(real, run, host, name):
    """As ComfyUI reads them: each layer's weights in fp8, with a scale."""
    import comfy.ops
    import comfy.utils

    family, sigmas = real.FAMILIES[name], torch.tensor([0.3, 0.7])
    exact = family.convert(dict(family.diffusers().state_dict()))
    written, values = {"scaled_fp8": torch.zeros(2, dtype=FEW)}, {}
    for key, value in exact.items():
        written[key] = value
        if "blocks" in key and value.dim() == 2:
            scale = value.abs().max() / 448
            written[key] = (value / scale).to(FEW)
            written[key.removesuffix("weight") + "scale_weight"] = scale
            values[key] = written[key].float() * scale
    state, _ = comfy.utils.convert_old_quants(written, "", {})
    config = comfy.utils.detect_layer_quantization(state, "")
    operations = comfy.ops.mixed_precision_ops(config, torch.float32, disabled={"float8_e4m3fn"})
    patcher, plain = model_with(family, operations, state), family.comfy()
    types = weight_types(patcher.model.diffusion_model)
    assert types["F8_E4M3"] == sum(value.numel() for value in values.values())
    plain.model.diffusion_model.load_state_dict(values, strict=False)
    before = run.call(patcher, family, sigmas)
    for patch in (family.patch(1, 0.2, mix="modulate"), family.patch(2, 0.2)):
        patcher, plain = (host.attach(one, run.record(patch)) for one in (patcher, plain))
    found, expected = (run.call(one, family, sigmas) for one in (patcher, plain))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("kind", ["gguf", "fp8"])
def test_a_patch_is_trained_on_few_bits(real, run, host, request, kind, tmp_path, monkeypatch):
    """In inference mode, in which ComfyUI loads weights: gradients pass through, nothing stays."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    train = importlib.import_module("comfyui_dmp.train")
    family = real.FAMILIES["flux"]
    with torch.inference_mode():
        if kind == "gguf":
            pack = request.getfixturevalue("pack")
            exact = dict(family.diffusers().state_dict())
            _, names = rounded(pack, family.base, family.diffusers())
            cheap = gguf_model(pack, family, exact, names)
        else:
            cheap = family.comfy(dtype=FEW)
        before = dict(cheap.model.diffusion_model.named_parameters())
        how = {"learning_rate": 0.002, "steps": 12, "cfg": 1.0}
        asked = run.job(family, model=cheap, teacher=family.comfy(), **how)
        record = train.train(asked).record
    after = dict(cheap.model.diffusion_model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    types = use_of(record.loaded.patch.metadata)["cheap"]["types"]
    assert max(types, key=types.get) == {"gguf": "Q4_0", "fp8": "F8_E4M3"}[kind]
    models = asked.teacher, cheap, host.attach(cheap, record)
    full, few, repaired = (run.sample(model, family, cfg=1.0) for model in models)
    assert (repaired - full).norm() < (few - full).norm()
