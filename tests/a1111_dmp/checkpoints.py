"""Checkpoints with random weights for tests of a real A1111 or Forge server.

    WEBUI_PATH=... python tests/a1111_dmp/checkpoints.py tiny FOLDER

WEBUI_PATH is that of A1111, and its own Python runs this; CLIP_TOKENIZER names a folder with the
vocabulary of CLIP ViT-L. `tiny` writes two checkpoints of the architecture of SD 1.5, a tenth as
wide, with their configuration beside them: a picture takes a quarter of a second. `tiny-v` does so
for SD 2.x with v-prediction, and `tiny-xl` for SDXL; their OpenCLIP text encoder is the smallest
that open_clip knows. Forge builds text encoder and decoder by the book, so for it `narrow` makes
the UNet of SD 1.5 alone a tenth as wide, and `narrow-xl` that of SDXL (two gigabytes of text
encoders each). `sd15` writes one of full size (two gigabytes). `narrow-sd3` writes one checkpoint
of Stable Diffusion 3 with a small transformer (two gigabytes too); for it the server's folder must
have the tokenizers in `openai/clip-vit-large-patch14` and `google/t5-v1_1-xxl`. For all but `sd15`
the server needs the extension in `tests/a1111_dmp/server_extension`. Pictures are noise, but every
one is a function of all weights.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

LDM, SGM = "repositories/stable-diffusion-stability-ai", "repositories/generative-models"
CONFIGS = {
    "sd15": "configs/v1-inference.yaml",
    "tiny": "configs/v1-inference.yaml",
    "narrow": "configs/v1-inference.yaml",
    "tiny-v": f"{LDM}/configs/stable-diffusion/v2-inference-v.yaml",
    "tiny-xl": f"{SGM}/configs/inference/sd_xl_base.yaml",
    "narrow-xl": f"{SGM}/configs/inference/sd_xl_base.yaml",
}
VOCABULARY = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
WIDTH, TEXT, VAE = 32, 64, 32  # channels of the tiny UNet (as in tiny_base.py), text encoder, VAE
HEAD = 16  # channels of an attention head; SD 2.x and SDXL have a fixed number
OPEN_CLIP, OPEN_CLIP_WIDTH = "ViT-S-32-alt", 256
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
# The second text encoder of Stable Diffusion 3, and what the small transformer has of the real one.
CLIP_G = CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD3_DEPTH = 2  # as in tiny_base.py
SD3 = {"patch_size": 2, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
TINY_CLIP = {
    "hidden_size": TEXT,
    "intermediate_size": 2 * TEXT,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": TEXT,
}


def main(kind: str, folder: Path) -> None:
    """Writes the checkpoints of a kind into a folder."""
    webui = Path(os.environ["WEBUI_PATH"]).resolve()
    sys.path[:0] = [str(webui / LDM), str(webui / SGM)]
    if kind == "narrow-sd3":
        write(folder / f"{kind}-a.safetensors", sd3_shapes(), 0, half=True)
        return
    yaml = importlib.import_module("yaml")
    config = yaml.safe_load((webui / CONFIGS[kind]).read_text(encoding="utf-8"))
    params, tiny = config["model"]["params"], kind.startswith("tiny")
    clip = CLIP | TINY_CLIP if tiny else CLIP
    unet = unet_of(params)["params"]
    if kind != "sd15":
        unet["model_channels"] = WIDTH
    if tiny:
        params["first_stage_config"]["params"]["ddconfig"]["ch"] = VAE
        if "num_head_channels" in unet:
            unet["num_head_channels"] = HEAD
        write_text_encoder(folder / "tiny-clip", clip)
        unet["context_dim"] = narrow_text(params, folder / "tiny-clip")
        if "adm_in_channels" in unet:  # the pooled text, and three pairs of 256
            unet["adm_in_channels"] = OPEN_CLIP_WIDTH + 6 * 256
    shapes = shapes_of(params, clip)
    for seed, letter in enumerate("ab"):
        write(folder / f"{kind}-{letter}.safetensors", shapes, seed, half=kind != "tiny")
        if tiny:
            (folder / f"{kind}-{letter}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def unet_of(params: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the UNet, which LDM and its successor call differently."""
    found: dict[str, Any] = params.get("unet_config") or params["network_config"]
    return found


def text_encoders(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of the text encoders, by their place in the checkpoint."""
    if "cond_stage_config" in params:
        return {"cond_stage_model.": params["cond_stage_config"]}
    found = params["conditioner_config"]["params"]["emb_models"]
    texts = [embedder for embedder in found if embedder["input_key"] == "txt"]
    return {f"conditioner.embedders.{n}.": embedder for n, embedder in enumerate(texts)}


def narrow_text(params: dict[str, Any], clip: Path) -> int:
    """Makes the text encoders small; the width of what they give together."""
    width = 0
    for config in text_encoders(params).values():
        settings = config.setdefault("params", {})
        if "OpenCLIP" in config["target"]:
            settings["arch"] = OPEN_CLIP
            width += OPEN_CLIP_WIDTH
        else:
            settings["version"] = str(clip)
            if "layer_idx" in settings:
                settings["layer_idx"] = TINY_CLIP["num_hidden_layers"] - 1
            width += TEXT
    return width


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
    place, kind = unet_of(params)["target"].rsplit(".", 1)
    unet = getattr(importlib.import_module(place), kind)
    vae = importlib.import_module("ldm.modules.diffusionmodules.model")
    dd = params["first_stage_config"]["params"]["ddconfig"]
    settings = unet_of(params)["params"] | {"use_checkpoint": False}
    with torch.device("meta"):
        parts = {
            "model.diffusion_model.": unet(**settings),
            "first_stage_model.encoder.": vae.Encoder(**dd | {"attn_type": "vanilla"}),
            "first_stage_model.decoder.": vae.Decoder(**dd | {"attn_type": "vanilla"}),
            "first_stage_model.quant_conv.": torch.nn.Conv2d(2 * dd["z_channels"], 8, 1),
            "first_stage_model.post_quant_conv.": torch.nn.Conv2d(4, dd["z_channels"], 1),
        }
        for prefix, config in text_encoders(params).items():
            if "OpenCLIP" in config["target"]:
                arch = config.get("params", {}).get("arch", "ViT-H-14")
                parts[prefix + "model."] = open_clip(arch)
            else:
                transformers = importlib.import_module("transformers")
                parts[prefix + "transformer."] = transformers.CLIPTextModel(
                    transformers.CLIPTextConfig(**clip)
                )
    return {
        prefix + name: tensor.shape
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if not name.endswith("position_ids")
    }


def sd3_shapes() -> dict[str, torch.Size]:
    """Names and shapes of Stable Diffusion 3 with a small transformer, whose original names and
    shapes are few: A1111 makes 64 channels for each block."""
    depth, width = SD3_DEPTH, 64 * SD3_DEPTH
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, SD3["pooled_projection_dim"]),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, SD3["joint_attention_dim"]),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (SD3["patch_size"] ** 2 * 16, width),
        "x_embedder.proj": (width, 16, SD3["patch_size"], SD3["patch_size"]),
    }
    for n in range(depth):
        for stream in ("x_block", "context_block"):
            last = n == depth - 1 and stream == "context_block"  # it gives keys and values alone
            block = f"joint_blocks.{n}.{stream}"
            linear[f"{block}.adaLN_modulation.1"] = ((2 if last else 6) * width, width)
            linear[f"{block}.attn.qkv"] = (3 * width, width)
            if not last:
                linear[f"{block}.attn.proj"] = (width, width)
                linear[f"{block}.mlp.fc1"] = (4 * width, width)
                linear[f"{block}.mlp.fc2"] = (width, 4 * width)
    shapes = {"model.diffusion_model.pos_embed": torch.Size((1, 96**2, width))}
    for name, shape in linear.items():
        shapes[f"model.diffusion_model.{name}.weight"] = torch.Size(shape)
        shapes[f"model.diffusion_model.{name}.bias"] = torch.Size(shape[:1])
    transformers = importlib.import_module("transformers")
    vae = importlib.import_module("ldm.modules.diffusionmodules.model")
    dd = {"z_channels": 16, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "out_ch": 3}
    dd |= {"double_z": True, "resolution": 256, "in_channels": 3, "attn_resolutions": []}
    text = transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        parts = {
            "first_stage_model.encoder.": vae.Encoder(**dd),
            "first_stage_model.decoder.": vae.Decoder(**dd),
            "text_encoders.clip_l.transformer.": text(transformers.CLIPTextConfig(**CLIP)),
            "text_encoders.clip_g.transformer.": text(transformers.CLIPTextConfig(**CLIP_G)),
        }
    for prefix, part in parts.items():
        shapes |= {prefix + name: tensor.shape for name, tensor in part.state_dict().items()}
    return {k: shape for k, shape in shapes.items() if not k.endswith("position_ids")}


def open_clip(arch: str) -> torch.nn.Module:
    """OpenCLIP's text encoder."""
    model: torch.nn.Module = importlib.import_module("open_clip").create_model(arch, device="meta")
    del model.visual
    return model


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
