"""Checkpoints with random weights for tests of a real A1111 or Forge server.

    WEBUI_PATH=... python tests/a1111_dmp/checkpoints.py tiny FOLDER

WEBUI_PATH is that of A1111, and its own Python runs this; CLIP_TOKENIZER names a folder with the
vocabulary of CLIP ViT-L. `tiny` writes two checkpoints of the architecture of SD 1.5, a tenth as
wide, with their configuration beside them: a picture takes a quarter of a second. Forge builds text
encoder and decoder by the book, so for it `narrow` makes the UNet alone a tenth as wide. `sd15`
writes one of full size (two gigabytes). For the first two the server needs the extension in
`tests/a1111_dmp/server_extension`. Pictures are noise, but every one is a function of all weights.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

CONFIG = "configs/v1-inference.yaml"
REPOSITORY = "repositories/stable-diffusion-stability-ai"
VOCABULARY = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
WIDTH, TEXT, VAE = 32, 64, 32  # channels of the tiny UNet (as in tiny_base.py), text encoder, VAE
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


def main(kind: str, folder: Path) -> None:
    """Writes the checkpoints of a kind into a folder."""
    webui = Path(os.environ["WEBUI_PATH"]).resolve()
    sys.path[:0] = [str(webui / REPOSITORY)]
    yaml = importlib.import_module("yaml")
    config = yaml.safe_load((webui / CONFIG).read_text(encoding="utf-8"))
    params, clip = config["model"]["params"], dict(CLIP)
    if kind in ("tiny", "narrow"):
        params["unet_config"]["params"]["model_channels"] = WIDTH
    if kind == "tiny":
        clip |= {"hidden_size": TEXT, "intermediate_size": 2 * TEXT, "num_hidden_layers": 2}
        clip |= {"num_attention_heads": 4, "projection_dim": TEXT}
        params["unet_config"]["params"]["context_dim"] = TEXT
        params["first_stage_config"]["params"]["ddconfig"]["ch"] = VAE
        text = folder / "tiny-clip"
        write_text_encoder(text, clip)
        params["cond_stage_config"]["params"] = {"version": str(text)}
    shapes = shapes_of(params, clip)
    for seed, letter in enumerate("ab"):
        write(folder / f"{kind}-{letter}.safetensors", shapes, seed, half=kind != "tiny")
        if kind == "tiny":
            (folder / f"tiny-{letter}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def write_text_encoder(folder: Path, clip: dict[str, Any]) -> None:
    """A folder that transformers takes for a CLIP model; the tokenizer's files are copied.

    CLIP_TOKENIZER names the folder of the CLIP ViT-L vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    transformers = importlib.import_module("transformers")
    transformers.CLIPTextConfig(**clip).save_pretrained(folder)
    for name in VOCABULARY:
        shutil.copy(Path(os.environ["CLIP_TOKENIZER"]) / name, folder / name)


def shapes_of(params: dict[str, Any], clip: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of a whole checkpoint, from models without memory."""
    unet = importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
    vae = importlib.import_module("ldm.modules.diffusionmodules.model")
    transformers = importlib.import_module("transformers")
    dd = params["first_stage_config"]["params"]["ddconfig"]
    with torch.device("meta"):
        parts = {
            "model.diffusion_model.": unet(**params["unet_config"]["params"]),
            "first_stage_model.encoder.": vae.Encoder(**dd),
            "first_stage_model.decoder.": vae.Decoder(**dd),
            "first_stage_model.quant_conv.": torch.nn.Conv2d(2 * dd["z_channels"], 8, 1),
            "first_stage_model.post_quant_conv.": torch.nn.Conv2d(4, dd["z_channels"], 1),
            "cond_stage_model.transformer.": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**clip)
            ),
        }
    return {
        prefix + name: tensor.shape
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if not name.endswith("position_ids")
    }


def write(path: Path, shapes: dict[str, torch.Size], seed: int, half: bool) -> None:
    """Random values of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        fan = max(torch.Size(shape[1:]).numel(), 1)
        ones = len(shape) == 1 and name.endswith("weight")
        std = 0.02 if len(shape) <= 1 else fan**-0.5
        value = torch.randn(shape, generator=generator) * std + ones
        tensors[name] = value.half() if half else value
    importlib.import_module("safetensors.torch").save_file(tensors, path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
