"""A full-size SD 1.5 checkpoint with random weights, for tests of a real server.

    COMFYUI_PATH=... python tests/comfyui_dmp/checkpoints.py sd15-random.safetensors

It takes two gigabytes. Pictures are noise, but every one is a function of all weights.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip": "cond_stage_model.transformer.",
}
UNET = {
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


def main(path: Path) -> None:
    """Writes the checkpoint."""
    sys.path.append(os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = True
    shapes: dict[str, torch.Size] = {}
    for part, model in _models().items():
        for name, tensor in model.state_dict().items():
            shapes[PREFIXES[part] + name] = tensor.shape
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        fan = max(torch.Size(shape[1:]).numel(), 1)
        ones = len(shape) == 1 and name.endswith("weight")
        std = 0.02 if len(shape) <= 1 else fan**-0.5
        tensors[name] = (torch.randn(shape, generator=generator) * std + ones).half()
    importlib.import_module("safetensors.torch").save_file(tensors, path)


def _models() -> dict[str, torch.nn.Module]:
    """The three models, without memory for their weights."""
    unet = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    vae = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL
    clip = importlib.import_module("comfy.clip_model").CLIPTextModel
    ops = importlib.import_module("comfy.ops").disable_weight_init
    config = {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }
    with torch.device("meta"):
        return {
            "unet": unet(**UNET, device="meta", operations=ops),
            "vae": vae(ddconfig=VAE, embed_dim=4),
            "clip": clip(config, torch.float32, "meta", ops),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
