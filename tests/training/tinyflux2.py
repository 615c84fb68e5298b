"""FLUX.2 in small: its VAE, its text encoders, and the names of its tensors in single files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
import transformers
from torch import Tensor

from dmp_common import register_base
from dmp_common.bases.flux import Flux2
from training.base.families import table
from training.base.families.table import register_family

TAPS = (1, 2, 3)
DEV = replace(table.FLUX2, taps=TAPS)
KLEIN = register_base(Flux2("tiny-flux2-klein", double=1, single=2, width=32).base())
register_family(KLEIN, replace(table.FLUX2_KLEIN, taps=TAPS, multiple=4))


def make_klein(folder: Path, like: Path, **facts: object) -> Path:
    """Writes a tiny klein into a folder; returns the folder.

    Args:
        like: a tiny FLUX.2 dev with a tokenizer, whose VAE, scheduler and tokenizer it has too.
        facts: of the configuration of its pipeline.
    """
    for part in ("vae", "scheduler", "tokenizer"):
        shutil.copytree(like / part, folder / part)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).save_pretrained(folder / "transformer")  # fmt: skip
        qwen3(12).save_pretrained(folder / "text_encoder")
    index = {"_class_name": "Flux2KleinPipeline", **facts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def qwen3(vocabulary: int) -> nn.Module:
    """Qwen3 as the repositories of klein have it: with a head, and more layers than are read."""
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=vocabulary, hidden_size=4, intermediate_size=16, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        )
    )  # fmt: skip


def vae() -> nn.Module:
    """A VAE of factor 4, with its packing, and channels that the normalisation changes."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        made.bn.running_mean.normal_()
        made.bn.running_var.uniform_(0.5, 2.0)
        return made


def mistral(vocabulary: int) -> nn.Module:
    """Mistral 3 as the repository of FLUX.2 dev has it: with a half that sees pictures, and more
    layers than are read."""
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config={
                "model_type": "mistral", "vocab_size": vocabulary, "hidden_size": 4,
                "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 4,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                "patch_size": 14,
            },
        )
    )  # fmt: skip


def pruned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mistral's text half as ComfyUI's file has it: the layers that are read, no last norm, and the
    tokenizer as bytes."""
    layers = tuple(f"model.layers.{number}." for number in range(TAPS[-1]))
    texts = {key.removeprefix("language_model."): value for key, value in state.items()}
    kept = {
        key: value
        for key, value in texts.items()
        if key.startswith((*layers, "model.embed_tokens."))
    }
    return {**kept, "tekken_model": torch.zeros(3, dtype=torch.uint8)}


def vae_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE whose other names are those of the original, as FLUX.2's original has them."""
    inside = {"quant_conv.": "encoder.", "post_quant_conv.": "decoder."}
    return {
        next((half for part, half in inside.items() if key.startswith(part)), "") + key: value
        for key, value in state.items()
    }
