"""The bases: original names in the hosts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import dmp_common as dmp
from dmp_common import detect_base, get_base, known_bases
from dmp_common.attach.forms import as_tokens
from dmp_common.attach.modulation import parts_of
from dmp_common.bases.base import find_module
from dmp_common.bases.detect import naming_of
from tests.dmp_common import realwan
from tests.dmp_common.originalnames import original_shapes, unet_original_name
from tests.dmp_common.realbases import MODELS, meta, seen
from tests.dmp_common.test_bases_names import official_pixart
from tests.randomness import randomise


def check_host(model: nn.Module, name: str, call: Callable[[nn.Module], object] | None) -> None:
    """Paths, widths, time embedding and detection on a host's class, and shapes of a call."""
    base = get_base(MODELS[name].base)
    assert detect_base(model).name == base.name
    matching = {b.name: naming_of(model, b) for b in known_bases()}
    assert {k: v for k, v in matching.items() if v} == {base.name: "ldm"}
    if call is None:
        return
    inputs: dict[str, tuple[int, ...]] = {}
    times: list[tuple[int, ...]] = []
    source = base.times["ldm"]

    def watch(site: dmp.Site):
        key = site.arguments["ldm"]

        def hook(module, args, kwargs):
            x = args[key.index] if len(args) > key.index else kwargs[key.name]
            inputs[site.name] = tuple(as_tokens(x, site.forms.get("ldm")).shape)

        module = find_module(model, site.paths["ldm"])
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    outputs: dict[str, list[tuple[int, ...]]] = {}
    known = {site.name: site for site in base.outputs}
    parts = parts_of(base.outputs, "ldm")

    def watch_output(path: str):
        def hook(module, args, out):
            outputs.setdefault(path, []).append(tuple(out.shape))

        return find_module(model, path).register_forward_hook(hook)

    handles = [watch(site) for site in base.sites]
    handles += [watch_output(path) for path in parts]
    handles.append(
        find_module(model, source.path).register_forward_hook(
            lambda m, args, out: times.append(tuple(source.embedding(out).shape))
        )
    )
    with torch.no_grad():
        call(model)
    for handle in handles:
        handle.remove()
    assert times == [(2, base.embedding)]
    assert list(inputs) == [site.name for site in base.sites]
    assert set(outputs) == set(parts)
    for path, sites in parts.items():
        assert len(outputs[path]) == 1, path
        site, start = known[sites[-1].site], sites[-1].start
        assert outputs[path][0][site.axis] == start + site.width, path
    expected = seen(name).inputs
    for site in base.sites:
        if base.layout == "map":
            assert inputs[site.name] == expected[site.name], site.name
        else:
            assert inputs[site.name][::2] == (2, site.width), site.name
            assert inputs[site.name][1] in MODELS[name].lengths(site.stride), site.name
    arguments = list(inspect.signature(type(model).forward).parameters)[1:]
    assert source.argument.name in arguments or "kwargs" in arguments


@pytest.fixture(scope="module")
def comfyui() -> types.ModuleType:
    """`comfy.model_detection` of the ComfyUI at COMFYUI_PATH."""
    path = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (path / "comfy" / "model_detection.py").is_file():
        pytest.skip("needs ComfyUI's source: set COMFYUI_PATH to its folder")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
            importlib.import_module("comfy.model_base")
            return importlib.import_module("comfy.model_detection")
        except ImportError as error:
            pytest.skip(f"needs the Python packages of ComfyUI: {error}")


COMFY_CLASSES = {
    "sd15": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "sd21": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "sdxl": ("comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    "pixart-sigma": ("comfy.ldm.pixart.pixartms", "PixArtMS"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "sd35-medium": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "sd35-large": ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "flux-dev": ("comfy.ldm.flux.model", "Flux"),
    "flux-schnell": ("comfy.ldm.flux.model", "Flux"),
    "flux2": ("comfy.ldm.flux.model", "Flux"),
    "flux2-klein-4b": ("comfy.ldm.flux.model", "Flux"),
    "flux2-klein-9b": ("comfy.ldm.flux.model", "Flux"),
    "qwen-image": ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"),
    "lumina2": ("comfy.ldm.lumina.model", "NextDiT"),
    "z-image": ("comfy.ldm.lumina.model", "NextDiT"),
    **{name: real.comfyui for name, real in MODELS.items() if real.comfyui},
    **dict.fromkeys(realwan.CONFIGS, ("comfy.ldm.wan.model", "WanModel")),
}


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("name", COMFY_CLASSES)
def test_comfyui(comfyui, name, monkeypatch):
    """ComfyUI's own detection makes the model from the checkpoint's names and shapes."""
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "get_free_memory", lambda *a, **k: (2**40, 2**40))  # of meta
    module, class_name = COMFY_CLASSES[name]
    if name not in MODELS:
        pytest.skip("needs a diffusers that knows it")
    if importlib.util.find_spec(module.rpartition(".")[0]) is None:
        pytest.skip("needs a ComfyUI that knows it")
    shapes = official_pixart(False) if "pixart" in name else original_shapes(name)
    if "sd3" in name:
        shapes["pos_embed"] = (1, 96**2, get_base(name).embedding)
    state = {f"model.diffusion_model.{key}": meta(*shape) for key, shape in shapes.items()}
    found = comfyui.model_config_from_unet(state, "model.diffusion_model.")
    config = {key: found.unet_config[key] for key in found.unet_config if key != "image_model"}
    if "axes_dim" in config:  # ComfyUI 0.8 knows FLUX.2 dev's number of heads only
        config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
    operations = importlib.import_module("comfy.ops").disable_weight_init
    kind = getattr(importlib.import_module(module), class_name)
    config |= {"device": "meta", "dtype": torch.float32, "operations": operations}
    model = kind(**config).to("meta")
    model.eval().requires_grad_(False)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    own = {  # newer releases rename norms as they load
        key if key in shapes else key.replace(".weight", ".scale"): shape
        for key, shape in own.items()
    }
    if "pixart" in name:
        missing = set(shapes) - set(own)
    else:
        missing = {key for key in shapes if own.get(key) != shapes[key]}
        assert set(own) == set(shapes)
    assert not missing
    real = MODELS[name].inputs()

    def call(model: nn.Module) -> object:
        timesteps = torch.zeros(2, device="meta")
        if class_name == "UNetModel":
            y = meta(2, 2816) if name == "sdxl" else None
            return model(real["sample"], timesteps, context=real["encoder_hidden_states"], y=y)
        if class_name == "WanModel":
            return realwan.host_call(name)(model)
        latent = meta(2, MODELS[name].channels, *MODELS[name].latent)
        if MODELS[name].call is not None:
            return MODELS[name].call(model, latent, timesteps)
        text = real.get("encoder_hidden_states")
        if "pixart" in name:
            return model(latent, timesteps, text)
        if name == "qwen-image":
            return model(latent.unsqueeze(2), timesteps, text)
        if class_name == "NextDiT":
            return model(latent, timesteps, meta(2, 100, shapes["cap_embedder.0.weight"][0]), 100)
        y = real.get("pooled_projections")
        if class_name == "Flux":
            return model(latent, timesteps, text, y, real["guidance"])
        return model(latent, timesteps, context=text, y=y)

    check_host(model, name, call)


def _webui() -> Path:
    path = Path(os.environ.get("WEBUI_PATH", ""))
    if not os.environ.get("WEBUI_PATH") or not path.is_dir():
        pytest.skip("needs a webui's source: set WEBUI_PATH to the folder of A1111 or Forge")
    return path


UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
}
WEBUI_UNETS = {
    "sd15": dict(
        attention_resolutions=[4, 2, 1],
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        transformer_depth=1,
        context_dim=768,
    ),
    "sd21": dict(
        attention_resolutions=[4, 2, 1],
        channel_mult=[1, 2, 4, 4],
        num_head_channels=64,
        transformer_depth=1,
        context_dim=1024,
        use_linear_in_transformer=True,
    ),
    "sdxl": dict(
        attention_resolutions=[4, 2],
        channel_mult=[1, 2, 4],
        num_head_channels=64,
        transformer_depth=[1, 2, 10],
        context_dim=2048,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    ),
}
FORGE_SD = dict(
    num_res_blocks=[2] * 4,
    transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
)
FORGE_UNETS = {
    "sd15": FORGE_SD,
    "sd21": FORGE_SD,
    "sdxl": dict(
        num_res_blocks=[2] * 3,
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
    ),
}


def _webui_class(path: Path, name: str, monkeypatch) -> tuple[type[nn.Module], dict]:
    """The UNet class of A1111's repositories, or Forge's own, and its configuration."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    if (path / "backend" / "nn" / "unet.py").is_file():
        for folder in (path, path / "packages_3rdparty"):
            monkeypatch.syspath_prepend(str(folder))
        # Forge reads the first, Forge Neo the second.
        monkeypatch.setattr(sys, "argv", [sys.argv[0], "--always-cpu", "--cpu"])
        module, kind = "backend.nn.unet", "IntegratedUNet2DConditionModel"
        config = {**UNET, **WEBUI_UNETS[name], **FORGE_UNETS[name]}
        config.pop("attention_resolutions")
    else:
        folder, package = "stable-diffusion-stability-ai", "ldm"
        if name == "sdxl":
            folder, package = "generative-models", "sgm"
        root = path / "repositories" / folder
        if not (root / package).is_dir():
            pytest.skip(f"{path} has no repositories/{folder}: start the webui once")
        monkeypatch.syspath_prepend(str(root))
        if package == "sgm":  # its __init__ imports the whole of Stability's training code
            for part in ("sgm", "sgm.modules", "sgm.modules.encoders"):
                stub = types.ModuleType(part)
                stub.__path__ = [str(root / part.replace(".", "/"))]
                monkeypatch.setitem(sys.modules, part, stub)
        module, kind = f"{package}.modules.diffusionmodules.openaimodel", "UNetModel"
        config = {**UNET, **WEBUI_UNETS[name]}
        if package == "ldm":
            config["image_size"] = 32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(module), kind), config
        except ImportError as error:
            pytest.skip(f"needs the Python packages of the webui: {error}")


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_webui(name, monkeypatch):
    kind, config = _webui_class(_webui(), name, monkeypatch)
    with torch.device("meta"):
        try:
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(**config)
        except ImportError as error:
            pytest.skip(f"needs the Python packages of the webui: {error}")
    if management := sys.modules.get("backend.memory_management"):  # Forge asks how much is free
        monkeypatch.setattr(management, "get_free_memory", lambda *a, **k: (2**40, 2**40))
    model.to("meta").eval().requires_grad_(False)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == original_shapes(name)
    real = MODELS[name].inputs()

    def call(model: nn.Module) -> object:
        y = meta(2, 2816) if name == "sdxl" else None
        context = real["encoder_hidden_states"]
        return model(real["sample"], meta(2), context=context, y=y)

    check_host(model, name, call)


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
def test_webui_modulates_as_diffusers(monkeypatch):
    """A1111's (or Forge's) own UNet in small, with the weights of a diffusers one."""
    import diffusers

    kind, config = _webui_class(_webui(), "sd15", monkeypatch)
    config |= {"model_channels": 32, "channel_mult": [1, 2, 2, 2], "context_dim": 16}
    widths = (32, 64, 64, 64)
    model = kind.from_config(config) if hasattr(kind, "from_config") else kind(**config)
    torch.manual_seed(0)
    twin = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=widths, cross_attention_dim=16, attention_head_dim=8
    )
    base = dmp.register_base(
        dmp.bases.unet("narrow-ldm", widths=widths, context=16, attention=(True, True, True, False))
    )
    names = {key: unet_original_name(key, 4) for key in twin.state_dict()}
    model.load_state_dict({names[key]: value for key, value in twin.state_dict().items()})
    for one in (model, twin):
        one.eval().requires_grad_(False)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    t = torch.tensor([700.0, 100.0])
    calls = (lambda: model(x, t, context=text), lambda: twin(x, t, text, return_dict=False)[0])
    patch = randomise(dmp.Patch.create(base, mix="modulate", sites="outputs"), 1, 0.2).eval()
    with torch.inference_mode():
        plain = [call() for call in calls]
        with dmp.attach(model, patch), dmp.attach(twin, patch):
            changed = [call() for call in calls]
        after = calls[0]()
    for ours, theirs in (plain, changed):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert (changed[0] - plain[0]).norm() > 0.1 * plain[0].norm()
    assert torch.equal(after, plain[0])
