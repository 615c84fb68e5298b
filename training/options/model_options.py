"""Options about the base, the patch and the methods it is compared with.

Nothing here imports torch: `--help` must not wait for it.
"""

from __future__ import annotations

from typing import Literal

from training.options.declaring import Options, option

Method = Literal["dmp", "prompt", "lora", "full", "joint"]
Quantization = Literal[
    "rtn2", "rtn3", "rtn4", "rtn5", "rtn6", "rtn7", "rtn8",
    "rtn2-group32", "rtn3-group32", "rtn4-group32", "rtn5-group32", "rtn6-group32",
    "rtn7-group32", "rtn8-group32",
    "fp8", "fp8-scaled", "int8", "int4", "nf4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
]  # fmt: skip

# The bases that the trainer knows, as `--help` and errors list them.
BASES = (
    "digits, sd15, sd21, sdxl, dit-s/2, dit-b/2, dit-l/2, dit-xl/2 (also with /4 and /8), pixart, "
    "sd3, sd35-medium, sd35-large, flux, flux2, flux2-klein-4b, flux2-klein-9b, qwen-image, "
    "z-image, lumina2, ernie-image, chroma, krea2, qwen-image-2.1, anima, "
    "wan-1.3b, wan-14b, wan22-5b, wan21-i2v-14b, wan22-i2v-14b, "
    "auraflow, hunyuan-image, sana, sana-0.6b"
)


class ModelOptions(Options):
    """Which frozen base, and from where."""

    base: str = option(
        "model",
        "auto",
        f"Patch this frozen model: {BASES}. auto recognises the weights of "
        "--pretrained_model_name_or_path.",
        common=True,
        min_length=1,
    )
    pretrained_model_name_or_path: str | None = option(
        "model",
        None,
        "Load the weights of the base from here: a .safetensors, .ckpt, .pt or .pth file, a "
        "diffusers folder or a hub id. By default they come from the usual repository of the "
        "base.",
        common=True,
    )
    expert: Literal["high", "low"] | None = option(
        "model",
        None,
        "Train on this one of the two models of Wan 2.2 A14B, that for high or that for low noise, "
        "at its own timesteps unless --min_timestep or --max_timestep limits them. The file says "
        "for which one it is.",
    )
    frames: int = option(
        "image size",
        1,
        "Train on videos of so many frames, for wan: 1 and a multiple of 4.",
        ge=1,
    )
    first_frames: bool = option(
        "model",
        False,
        "Train wan22-5b as a model of picture to video: the first frame of each video is given.",
    )
    base_config: str | None = option(
        "model",
        None,
        "Take what a single file lacks (configuration, tokenizers, VAE, text encoders) from "
        "this diffusers folder or hub id. By default it is the usual repository of the base.",
    )
    weights_variant: str | None = option(
        "model", None, "Load this variant of the files in a diffusers folder, such as fp16."
    )
    vae: str | None = option(
        "model",
        None,
        "Use another VAE: a file, a diffusers folder or a hub id. By default it is the base's own.",
    )
    no_half_vae: bool = option(
        "model", False, "Keep the VAE in float32 whatever --mixed_precision is."
    )
    ae: str | None = option(
        "model",
        None,
        "Use this VAE. It is the same as --vae, by the name that Flux and SD3 users know.",
    )
    clip_l: str | None = option(
        "model",
        None,
        "Load the text encoder CLIP-L from this file (clip_l.safetensors): for sd15, sdxl, sd3, "
        "sd35 and flux. Its configuration and tokenizer come from --base_config, or from the "
        "usual repository of the base.",
    )
    clip_g: str | None = option(
        "model",
        None,
        "Load the text encoder CLIP-G from this file (clip_g.safetensors): for sdxl, sd3 and sd35.",
    )
    t5xxl: str | None = option(
        "model",
        None,
        "Load the text encoder T5-XXL from this file, in fp16, bf16 or fp8: for sd3, sd35, flux "
        "and pixart, UMT5-XXL for wan, and ByT5 for hunyuan-image. Weights in fp8 are converted to "
        "the precision of the base.",
    )
    max_token_length: Literal[75, 150, 225] = option(
        "model", 75, "Cut captions after this many tokens, for sd15, sd21 and sdxl."
    )
    t5_max_token_length: int | None = option(
        "model",
        None,
        "Cut captions for T5 after this many tokens. By default it is 300 for pixart, 256 for "
        "sd3 and 512 for flux and wan.",
        ge=1,
    )
    llm_max_token_length: int | None = option(
        "model",
        None,
        "Cut captions for a language model after this many tokens, the template around them "
        "included. By default it is 256 for lumina2, else 512.",
        ge=1,
    )
    system_prompt: str | None = option(
        "model",
        None,
        "Put this text before each caption that is not empty, for lumina2. By default it is the "
        "pipeline's own; Neta Lumina has another.",
    )
    clip_skip: int | None = option(
        "model",
        None,
        "Take the output of this layer of CLIP, counted from the last one, which is 1; for sd15 "
        "and sd21.",
        ge=1,
        le=12,
    )
    student_weights: str | None = option(
        "model",
        None,
        "Train on the cheap model in this file, beside the exact base: the same base in fewer "
        "bits, a .gguf file (as ComfyUI-GGUF reads them) or a .safetensors file in fp8, or another "
        "model of the same shapes in a .safetensors file.",
    )
    student_quantization: Quantization | None = option(
        "model",
        None,
        "Train on a cheap model that is made from the exact base: the linear layers of its blocks "
        "in fewer bits. q4_0 and the other types of GGUF need the package gguf, int8 and int4 "
        "torchao, nf4 bitsandbytes. rtn3 rounds each weight to the nearest of 3 bits with one "
        "scale for each row, rtn3-group32 with a scale and a minimum for each 32 weights; both "
        "are simulated in floating point and save no memory.",
    )
    text_conditional: bool = option(
        "model",
        False,
        "Condition a DiT on pooled CLIP-L text, through a linear layer, instead of on a class. "
        "Train that layer first with --method full, or load a base that has it.",
    )
    text_encoder: str | None = option(
        "model",
        None,
        "Load the text encoder that is a language model from this file: for lumina2, "
        "z-image, qwen-image, flux2, krea2, ernie-image, anima, hunyuan-image and sana. With "
        "--text_conditional, load CLIP from this folder or hub id; by default it is "
        "openai/clip-vit-large-patch14.",
    )
    unconditional: bool = option(
        "model", False, "Train a DiT without classes: every image has the null class."
    )
    flux_guidance_scale: float = option(
        "model",
        1.0,
        "Give a guidance-distilled Flux (FLUX.1 dev, FLUX.2 dev) this guidance scale in training. "
        "kohya's --guidance_scale is the same.",
        ge=0,
    )


class PatchOptions(Options):
    """What is trained: a patch of some variant, or one of the methods it is compared with."""

    method: Method = option(
        "patch",
        "dmp",
        "Choose what is trained. dmp: prompts with a gate. prompt: prompts alone. lora: a LoRA "
        "by peft. full: every weight of the base. joint: every weight and a patch together, "
        "from scratch.",
        common=True,
    )
    dmp_sites: str | None = option(
        "patch",
        None,
        "Put prompts at these block inputs: all, a named set (encoder, decoder, blocks), or "
        "names with commas between them; with --mix modulate at these outputs: all, or a named set "
        "(linear, modulation, modulated). By default the base decides.",
    )
    dmp_depth: int | None = option("patch", None, "Patch the first k block inputs only.", ge=1)
    grid: int | None = option(
        "patch",
        None,
        "Give the grid of prompts of a block input this many rows and columns. By default the "
        "base decides.",
        ge=1,
        le=256,
    )
    grid_scope: Literal["patch", "site"] = option(
        "patch",
        "patch",
        "Give each block input the same grid, or (site) take --grid for the finest block inputs of "
        "a UNet and give coarser ones as many prompts as they have cells: with --grid 64 that is "
        "the input's full size at 512 pixels, as the paper says.",
    )
    gate: Literal["linear", "attention", "none"] = option(
        "patch",
        "linear",
        "Choose what weights the prompts by the timestep; none is naive prompt tuning.",
    )
    selection: Literal["soft", "hard"] = option(
        "patch",
        "soft",
        "Choose how prompts are selected: soft weights all of them, hard keeps the top 75%.",
    )
    grids: int = option(
        "patch",
        1,
        "Give each block input this many prompt grids, K; the paper has one. With --mix modulate "
        "it is the number of pairs of a scale and a shift, 4 by default.",
        ge=1,
        le=64,
    )
    gate_unit: Literal["prompt", "grid"] = option(
        "patch",
        "prompt",
        "Give a weight of its own to each prompt, as in the paper, or to each grid.",
    )
    gate_form: Literal["softmax", "residual"] = option(
        "patch",
        "softmax",
        "Choose how the gate's output becomes weights: softmax over the prompts, as in the "
        "paper, or residual, 1 plus the output, which may have any sign.",
    )
    across_depth: Literal["distinct", "uniform"] = option(
        "patch",
        "distinct",
        "Let the gate see the depth of a block (distinct) or not (uniform).",
    )
    mix: Literal["add", "prepend", "modulate"] = option(
        "patch",
        "add",
        "Choose what prompts do: add adds them to the input of a block, prepend puts them in front "
        "of its tokens, modulate scales and shifts the channels of modules' outputs.",
        common=True,
    )
    condition: Literal["t", "t+y"] = option(
        "patch",
        "t",
        "Let the gate see the timestep alone, or the timestep and the class or pooled text.",
    )
    prompt_init: Literal["zero", "random"] = option(
        "patch",
        "zero",
        "Initialise the prompts with zeros, which starts exactly at the base, or at random.",
    )
    gate_init: Literal["zero", "random", "stages"] | None = option(
        "patch",
        None,
        "Initialise the gate like this; stages gives each grid a part of the timesteps. By "
        "default it is stages for a residual gate of several grids, else zero.",
    )
    prompt_scale: Literal["mean", "literal"] = option(
        "patch",
        "mean",
        "Choose what is learned: literal trains the prompts p themselves, as the paper does; "
        "mean trains p / N, so that one learning rate suits every grid. The file is the same.",
    )
    network_weights: str | None = option(
        "patch",
        None,
        "Initialise from this patch, a file or hub id. Optimiser and step count start anew.",
    )
    network_dim: int | None = option(
        "patch",
        None,
        "Give the LoRA of --method lora this rank. By default it has about as many parameters "
        "as the patch.",
        ge=1,
    )
    network_min_dim: int | None = option(
        "patch",
        None,
        "Let the rank of --method lora fall with the noise, from --network_dim without noise to "
        "this at the noisiest timestep (T-LoRA). No host applies such a file: it is for "
        "comparisons.",
        ge=1,
    )
    network_alpha: float | None = option(
        "patch", None, "Give the LoRA of --method lora this alpha. By default it is the rank.", gt=0
    )
