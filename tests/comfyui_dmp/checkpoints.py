"""Checkpoints with random weights for tests of a real server, in the formats ComfyUI loads.

    COMFYUI_PATH=... python tests/comfyui_dmp/checkpoints.py sdxl sdxl-random.safetensors

SD 1.5, SD 2.1 and SDXL have their full size (2, 3 and 7 gigabytes), and so has the ControlNet;
the transformers have ComfyUI's real classes with fewer blocks (`pack/` registers bases for
them). Pictures are noise, but every one is a function of all weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Shapes = dict[str, torch.Size]

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "legacy": False,
    "num_heads": 8,
}
SD21 = SD15 | {
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "num_heads": -1,
    "num_head_channels": 64,
}
SDXL = SD21 | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
CONTROLNET_KEYS = set(SD15) - {"out_channels", "transformer_depth_output"}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SD3 = {
    "in_channels": 16,
    "depth": 2,  # ComfyUI takes width and heads from it
    "patch_size": 2,
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 24,
    "num_patches": 24 * 24,
    "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 128},
    },
}
FLUX = {  # ComfyUI's loader fixes the heads, and with them the width
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
PIXART = {  # the loader fixes the width
    "image_model": "pixart_sigma",
    "in_channels": 4,
    "input_size": 64,
    "patch_size": 2,
    "hidden_size": 1152,
    "num_heads": 16,
    "depth": 2,
    "model_max_length": 300,
    "micro_condition": False,
    "pe_interpolation": 1.0,
}


def main(kind: str, path: Path) -> None:
    """Writes a checkpoint."""
    sys.path.append(os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True
    shapes = KINDS[kind]()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        fan = max(torch.Size(shape[1:]).numel(), 1)
        ones = len(shape) == 1 and name.endswith(("weight", "scale"))
        # ComfyUI tells v-prediction by how far the biases of SD 2.1 spread.
        std = 0.12 if len(shape) <= 1 and kind == "sd21" else 0.02
        std = std if len(shape) <= 1 else fan**-0.5
        tensors[name] = (torch.randn(shape, generator=generator) * std + ones).half()
    temporary = path.with_suffix(".part")
    importlib.import_module("safetensors.torch").save_file(tensors, temporary)
    temporary.replace(path)


def _of(prefix: str, module: str, name: str, *args: Any, **options: Any) -> Shapes:
    """Shapes of one of ComfyUI's models under the names a checkpoint gives them."""
    model = getattr(importlib.import_module(module), name)(*args, **options)
    return {prefix + key: tensor.shape for key, tensor in model.state_dict().items()}


def _ops() -> Any:
    return importlib.import_module("comfy.ops").disable_weight_init


def _unet(config: dict[str, Any]) -> Shapes:
    module = "comfy.ldm.modules.diffusionmodules.openaimodel"
    options = {"device": "meta", "operations": _ops()}
    return _of("model.diffusion_model.", module, "UNetModel", **config, **options)


def _vae(channels: int = 4) -> Shapes:
    module = "comfy.ldm.models.autoencoder"
    config = VAE | {"z_channels": channels}
    with torch.device("meta"):
        return _of(
            "first_stage_model.", module, "AutoencoderKL", ddconfig=config, embed_dim=channels
        )


def _clip(prefix: str, file: str) -> Shapes:
    config = json.loads((Path(os.environ["COMFYUI_PATH"]) / "comfy" / file).read_text("utf-8"))
    return _of(prefix, "comfy.clip_model", "CLIPTextModel", config, torch.float32, "meta", _ops())


def _sd15() -> Shapes:
    clip = _clip("cond_stage_model.transformer.", "sd1_clip_config.json")
    return _unet(SD15) | _vae() | clip


def _sd21() -> Shapes:
    clip = _clip("cond_stage_model.model.transformer.", "text_encoders/sd2_clip_config.json")
    return _unet(SD21) | _vae() | clip


def _sdxl() -> Shapes:
    large = _clip("conditioner.embedders.0.transformer.", "sd1_clip_config.json")
    huge = _clip("conditioner.embedders.1.model.transformer.", "clip_config_bigg.json")
    return _unet(SDXL) | _vae() | large | huge


def _controlnet() -> Shapes:
    config = {key: SD15[key] for key in CONTROLNET_KEYS}
    options = {"hint_channels": 3, "device": "meta", "operations": _ops()}
    return _of("control_model.", "comfy.cldm.cldm", "ControlNet", **config, **options)


def _sd3_whole() -> Shapes:
    """A checkpoint with everything but T5, which ComfyUI does without."""
    large = _clip("text_encoders.clip_l.transformer.", "sd1_clip_config.json")
    huge = _clip("text_encoders.clip_g.transformer.", "clip_config_bigg.json")
    model = {f"model.diffusion_model.{key}": shape for key, shape in KINDS["sd3"]().items()}
    return model | _vae(16) | large | huge


def _transformer(module: str, name: str, config: dict[str, Any]) -> Callable[[], Shapes]:
    def shapes() -> Shapes:
        options = {"device": "meta", "operations": _ops()}
        return _of("", f"comfy.ldm.{module}", name, **config, **options)

    return shapes


def _flux() -> Shapes:
    """Under the original names, which every version reads; newer classes have one of their own."""
    shapes = _transformer("flux.model", "Flux", FLUX)()
    return {key.replace("_norm.weight", "_norm.scale"): shape for key, shape in shapes.items()}


def _dit() -> Shapes:
    """DiT-S/2 as ComfyUI_ExtraModels has it, full size."""
    file = Path(os.environ["COMFYUI_EXTRAMODELS_PATH"]) / "DiT" / "model.py"
    spec = importlib.util.spec_from_file_location("extramodels_dit_model", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    sizes = {"depth": 12, "num_heads": 6, "patch_size": 2, "hidden_size": 384, "input_size": 32}
    return _of("", spec.name, "DiT", **sizes, num_classes=1000)


KINDS: dict[str, Callable[[], Shapes]] = {
    "sd15": _sd15,
    "sd21": _sd21,
    "sdxl": _sdxl,
    "controlnet": _controlnet,
    "sd3": _transformer("modules.diffusionmodules.mmdit", "MMDiT", SD3),
    "flux": _flux,
    "sd3-whole": _sd3_whole,
    "dit": _dit,
    "pixart": _transformer("pixart.pixartms", "PixArtMS", PIXART),
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
