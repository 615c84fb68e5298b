"""Options about the base, the patch and the methods it is compared with.

Nothing here imports torch: `--help` must not wait for it.
"""

from __future__ import annotations

from typing import Literal

from training.options.declaring import Options, option
from training.options.loss_options import LossOptions

Method = Literal["dmp", "prompt", "lora", "full", "joint"]
TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]

# The bases that the trainer knows, as `--help` and errors list them.
BASES = (
    "digits, sd15, sd21, sdxl, dit-s/2, dit-b/2, dit-l/2, dit-xl/2 (also with /4 and /8), pixart, "
    "sd3, sd35-medium, sd35-large, flux"
)


class ModelOptions(Options):
    """Which frozen base, and from where."""

    base: str = option(
        "model",
        "auto",
        f"The frozen model that is patched: {BASES}. auto recognises the weights of "
        "--pretrained_model_name_or_path.",
        common=True,
        min_length=1,
    )
    pretrained_model_name_or_path: str | None = option(
        "model",
        None,
        "Weights of the base: a .safetensors, .ckpt, .pt or .pth file, a diffusers folder or a hub "
        "id. By default they come from the usual repository of the base.",
        common=True,
    )
    base_config: str | None = option(
        "model",
        None,
        "Diffusers folder or hub id with what a single file lacks: configuration, tokenizers, VAE "
        "and text encoders. By default it is the usual repository of the base.",
    )
    weights_variant: str | None = option(
        "model", None, "Variant of the files in a diffusers folder, such as fp16."
    )
    vae: str | None = option(
        "model",
        None,
        "Another VAE: a file, a diffusers folder or a hub id. By default it is the base's own.",
    )
    no_half_vae: bool = option(
        "model", False, "Keep the VAE in float32 whatever --mixed_precision is."
    )
    ae: str | None = option(
        "model", None, "The same as --vae, by the name that Flux and SD3 users give it."
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
        "and pixart. Weights in fp8 are converted to the precision of the base.",
    )
    max_token_length: Literal[75, 150, 225] = option(
        "model", 75, "Longest caption in tokens, for sd15, sd21 and sdxl. The rest is cut."
    )
    t5_max_token_length: int | None = option(
        "model",
        None,
        "Longest caption in tokens of T5. By default it is 300 for pixart, 256 for sd3 and 512 for "
        "flux.",
        ge=1,
    )
    clip_skip: int | None = option(
        "model",
        None,
        "Take the output of this layer of CLIP, counted from the last one, which is 1; for sd15 "
        "and sd21.",
        ge=1,
        le=12,
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
        "CLIP for --text_conditional, as a folder or hub id. By default it is "
        "openai/clip-vit-large-patch14.",
    )
    unconditional: bool = option(
        "model", False, "Train a DiT without classes: every image has the null class."
    )
    flux_guidance_scale: float = option(
        "model",
        1.0,
        "Guidance scale that a guidance-distilled Flux receives in training. kohya's "
        "--guidance_scale is the same.",
        ge=0,
    )


class PatchOptions(Options):
    """What is trained: a patch of some variant, or one of the methods it is compared with."""

    method: Method = option(
        "patch",
        "dmp",
        "What is trained. dmp: prompts with a gate. prompt: prompts alone. lora: a LoRA by peft. "
        "full: every weight of the base. joint: every weight and a patch together, from scratch.",
        common=True,
    )
    dmp_sites: str | None = option(
        "patch",
        None,
        "Block inputs that get prompts: all, a named set (encoder, decoder, blocks), or names with "
        "commas between them. By default the base decides.",
    )
    dmp_depth: int | None = option("patch", None, "Patch the first k block inputs only.", ge=1)
    grid: int | None = option(
        "patch",
        None,
        "Rows and columns of the grid of prompts of a block input. By default the base decides.",
        ge=1,
        le=256,
    )
    gate: Literal["linear", "attention", "none"] = option(
        "patch",
        "linear",
        "What weights the prompts by the timestep; none is naive prompt tuning.",
    )
    selection: Literal["soft", "hard"] = option(
        "patch", "soft", "soft weights all prompts; hard keeps the top 75% of them."
    )
    grids: int = option(
        "patch", 1, "Number of prompt grids of a block input, K; the paper has one.", ge=1, le=64
    )
    gate_unit: Literal["prompt", "grid"] = option(
        "patch",
        "prompt",
        "What gets a weight of its own: each prompt, as in the paper, or each grid.",
    )
    gate_form: Literal["softmax", "residual"] = option(
        "patch",
        "softmax",
        "softmax makes weights over the prompts, as in the paper; residual takes 1 plus the output "
        "of the gate, which may have any sign.",
    )
    across_depth: Literal["distinct", "uniform"] = option(
        "patch",
        "distinct",
        "Whether the gate sees the depth of a block (distinct) or not (uniform).",
    )
    mix: Literal["add", "prepend"] = option(
        "patch", "add", "Whether prompts are added to the input or prepended as tokens."
    )
    condition: Literal["t", "t+y"] = option(
        "patch",
        "t",
        "Input of the gate: the timestep, or the timestep and the class or pooled text.",
    )
    prompt_init: Literal["zero", "random"] = option(
        "patch", "zero", "Initial values of the prompts; zero starts exactly at the base."
    )
    gate_init: Literal["zero", "random", "stages"] | None = option(
        "patch",
        None,
        "Initial values of the gate; stages gives each grid a part of the timesteps. By default "
        "it is stages for a residual gate of several grids, else zero.",
    )
    prompt_scale: Literal["mean", "literal"] = option(
        "patch",
        "mean",
        "literal trains the prompts p themselves, as the paper does; mean trains p / N, so that "
        "one learning rate suits every grid. The file is the same.",
    )
    network_weights: str | None = option(
        "patch",
        None,
        "Initialise from this patch, a file or hub id. Optimiser and step count start anew.",
    )
    network_dim: int | None = option(
        "patch",
        None,
        "Rank of --method lora. By default the LoRA has about as many parameters as the patch.",
        ge=1,
    )
    network_alpha: float | None = option(
        "patch", None, "Alpha of --method lora. By default it is the rank.", gt=0
    )


class ObjectiveOptions(LossOptions):
    """What the prediction is compared with, at which timesteps, with which weight."""

    v_parameterization: bool = option(
        "objective",
        False,
        "The base predicts v. Say so only where the configuration of its scheduler does not.",
    )
    zero_terminal_snr: bool = option(
        "objective",
        False,
        "Rescale the noise schedule so that the last timestep is pure noise.",
    )
    min_snr_gamma: float | None = option(
        "objective",
        None,
        "Weight timesteps by min(SNR, gamma); 5 is usual, 0 disables it.",
        gt=0,
    )
    debiased_estimation_loss: bool = option(
        "objective", False, "Weight timesteps by 1 / sqrt(SNR)."
    )
    p2_gamma: float | None = option(
        "objective",
        None,
        "Weight timesteps by 1 / (p2_k + SNR)^gamma; 1 is usual, 0 disables it.",
        gt=0,
    )
    p2_k: float = option("objective", 1.0, "The constant k of --p2_gamma.", gt=0)
    relative_loss: bool = option(
        "objective",
        False,
        "Weight timesteps by 1 / the loss of the base there, measured first on training images: an "
        "improvement by 1% counts the same at every noise level.",
    )
    variational_weight: float = option(
        "objective",
        1.0,
        "Weight of the variational term, for bases that learn sigma; 0 disables it.",
        ge=0,
    )
    min_timestep: int = option(
        "objective",
        0,
        "First timestep that is trained; the patch is off below it.",
        ge=0,
        le=999,
    )
    max_timestep: int = option(
        "objective",
        1000,
        "First timestep that is no longer trained; the patch is off from it on.",
        ge=1,
        le=1000,
    )
    timestep_sampling: TimestepSampling = option(
        "objective",
        "sigma",
        "How timesteps of flow models are drawn; sigma draws as --weighting_scheme says and then "
        "shifts them.",
    )
    weighting_scheme: WeightingScheme = option(
        "objective",
        "none",
        "Density (logit_normal, mode) or weight (sigma_sqrt, cosmap) of the timesteps of flow "
        "models.",
    )
    logit_mean: float = option("objective", 0.0, "Mean of --weighting_scheme logit_normal.")
    logit_std: float = option(
        "objective", 1.0, "Standard deviation of --weighting_scheme logit_normal.", gt=0
    )
    mode_scale: float = option("objective", 1.29, "Scale of --weighting_scheme mode.")
    sigmoid_scale: float = option(
        "objective", 1.0, "Scale of --timestep_sampling sigmoid, shift and flux_shift.", gt=0
    )
    discrete_flow_shift: float | None = option(
        "objective",
        None,
        "Shift of the timesteps of flow models. By default it is that of the scheduler.",
        gt=0,
    )
    importance_weight: float = option(
        "objective",
        0.0,
        "Weight of the importance loss, which balances the prompts; 0 disables it.",
        ge=0,
    )
    load_weight: float = option(
        "objective",
        0.0,
        "Weight of the load loss, which balances the prompts; 0 disables it.",
        ge=0,
    )
    balancing_timesteps: int = option(
        "objective", 16, "Number of timesteps at which the balancing losses are evaluated.", ge=16
    )
