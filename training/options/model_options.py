"""Options about the base, the patch and the methods it is compared with.

Nothing here imports torch: `--help` must not wait for it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from training.options.declaring import option

Method = Literal["dmp", "prompt", "lora", "full", "joint"]
TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


class ModelOptions(BaseModel):
    """Which frozen base, and from where."""

    base: str = option(
        "model",
        "digits",
        "digits, sd15, sd21, sdxl, dit-s/2 b/2 l/2 xl/2 (also /4 and /8), pixart, sd3, "
        "sd35-medium, sd35-large, flux; auto detects it from the weights",
    )
    pretrained_model_name_or_path: str | None = option(
        "model",
        None,
        "weights of the base: a .safetensors, .ckpt, .pt or .pth file, a diffusers folder or a hub "
        "id (default: the base's own)",
    )
    base_config: str | None = option(
        "model",
        None,
        "diffusers folder or hub id that has what a single file lacks: configuration, tokenizers, "
        "VAE, text encoders (default: the base's own)",
    )
    weights_variant: str | None = option(
        "model", None, "variant of the files in a diffusers folder, such as fp16"
    )
    vae: str | None = option(
        "model", None, "another VAE: a file, a diffusers folder or a hub id (default: the base's)"
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
    no_half_vae: bool = option("model", False, "keep the VAE in float32 under --mixed_precision")
    max_token_length: Literal[75, 150, 225] = option(
        "model", 75, "tokens of a caption, for sd15, sd21 and sdxl"
    )
    t5_max_token_length: int | None = option(
        "model",
        None,
        "tokens of a caption in T5 (default: 300 for pixart, 256 for sd3, 512 for flux)",
        ge=1,
    )
    clip_skip: int | None = option(
        "model", None, "take CLIP's last layer but this, for sd15 and sd21 (kohya counts from 1)",
        ge=1, le=12,
    )  # fmt: skip
    text_conditional: bool = option(
        "model",
        False,
        "DiT only: pooled CLIP-L through a linear layer in place of the class embedding; train it "
        "with --method full, or load a base that was",
    )
    text_encoder: str | None = option(
        "model",
        None,
        "CLIP for --text_conditional, a folder or hub id (default: openai/clip-vit-large-patch14)",
    )
    unconditional: bool = option(
        "model", False, "DiT only: train without classes, every image with the null class"
    )
    flux_guidance_scale: float = option(
        "model", 1.0, "guidance that a guidance-distilled Flux is told in training", ge=0
    )
    sdpa: bool = option(
        "model", True, "kohya's flag; PyTorch's scaled dot product attention is always used"
    )


class PatchOptions(BaseModel):
    """What is trained: a patch of some variant, or one of the methods it is compared with."""

    method: Method = option(
        "patch",
        "dmp",
        "dmp: prompts and gate; prompt: prompts alone (gate none); lora: peft's LoRA; full: every "
        "weight of the base; joint: every weight and a patch together, from scratch",
    )
    dmp_sites: str | None = option(
        "patch", None, "all, a named set (encoder, decoder, blocks) or names joined by commas"
    )
    dmp_depth: int | None = option("patch", None, "use the first k sites only", ge=1)
    grid: int | None = option("patch", None, "rows and columns of the prompt grid", ge=1, le=256)
    gate: Literal["linear", "attention", "none"] = option(
        "patch", "linear", "what weights the prompts; none is naive prompt tuning"
    )
    selection: Literal["soft", "hard"] = option("patch", "soft", "soft weights, or the top 75 %%")
    grids: int = option("patch", 1, "K, prompt grids of a site; the paper has one", ge=1, le=64)
    gate_unit: Literal["prompt", "grid"] = option(
        "patch", "prompt", "what has a weight of its own: each prompt (the paper), or each grid"
    )
    gate_form: Literal["softmax", "residual"] = option(
        "patch",
        "softmax",
        "softmax over the prompts (the paper), or residual: 1 + the gate's output, of any sign",
    )
    across_depth: Literal["distinct", "uniform"] = option(
        "patch", "distinct", "whether the gate sees the depth of a site"
    )
    mix: Literal["add", "prepend"] = option("patch", "add", "how prompts join the input")
    condition: Literal["t", "t+y"] = option("patch", "t", "what the gate sees")
    prompt_init: Literal["zero", "random"] = option("patch", "zero", "how prompts begin")
    gate_init: Literal["zero", "random", "stages"] | None = option(
        "patch",
        None,
        "how the gate begins (default: zero; of a residual gate of grids stages, each grid with a "
        "part of the timesteps)",
    )
    prompt_scale: Literal["mean", "literal"] = option(
        "patch",
        "mean",
        "learn p / N (weight 1 on average, one learning rate for every grid), or p itself as the "
        "paper does; the file is the same",
    )
    network_weights: str | None = option(
        "patch", None, "a patch to go on from, a file or hub id (optimiser and step start anew)"
    )
    network_dim: int | None = option(
        "patch", None, "rank of --method lora (default: as many parameters as the patch)", ge=1
    )
    network_alpha: float | None = option(
        "patch", None, "alpha of --method lora (default: the rank)", gt=0
    )


class ObjectiveOptions(BaseModel):
    """What the prediction is compared with, at which timesteps, with which weight."""

    v_parameterization: bool = option(
        "objective", False, "the base predicts v; usually its scheduler's configuration says so"
    )
    zero_terminal_snr: bool = option(
        "objective", False, "rescale the noise schedule so that the last timestep is pure noise"
    )
    noise_offset: float = option(
        "objective", 0.0, "share of noise that is constant over the picture", ge=0, le=1
    )
    min_snr_gamma: float | None = option(
        "objective", None, "weight timesteps by min(SNR, gamma) (5 is usual)", gt=0
    )
    debiased_estimation_loss: bool = option("objective", False, "weight timesteps by 1 / sqrt(SNR)")
    p2_gamma: float | None = option(
        "objective", None, "weight timesteps by 1 / (p2_k + SNR)^gamma (1 is usual)", gt=0
    )
    p2_k: float = option("objective", 1.0, "see --p2_gamma", gt=0)
    relative_loss: bool = option(
        "objective",
        False,
        "weight timesteps by 1 / the base's own loss there, measured first on training images: an "
        "improvement by 1 %% counts alike at every noise level",
    )
    variational_weight: float = option(
        "objective", 1.0, "of the variational term, for bases that learn sigma", ge=0
    )
    min_timestep: int = option(
        "objective", 0, "first timestep trained on; a patch is off below it", ge=0, le=999
    )
    max_timestep: int = option(
        "objective", 1000, "one after the last; a patch is off from it on", ge=1, le=1000
    )
    timestep_sampling: TimestepSampling = option(
        "objective",
        "sigma",
        "how flow models draw timesteps; sigma: as --weighting_scheme says, then shifted",
    )
    weighting_scheme: WeightingScheme = option(
        "objective", "none", "density or weight of timesteps, for flow models"
    )
    logit_mean: float = option("objective", 0.0, "of weighting_scheme logit_normal")
    logit_std: float = option("objective", 1.0, "of weighting_scheme logit_normal", gt=0)
    mode_scale: float = option("objective", 1.29, "of weighting_scheme mode")
    sigmoid_scale: float = option(
        "objective", 1.0, "of timestep_sampling sigmoid, shift, flux_shift", gt=0
    )
    discrete_flow_shift: float | None = option(
        "objective", None, "shift of flow timesteps (default: the scheduler's)", gt=0
    )
    importance_weight: float = option("objective", 0.0, "of the importance loss", ge=0)
    load_weight: float = option("objective", 0.0, "of the load loss", ge=0)
    balancing_timesteps: int = option(
        "objective", 16, "timesteps the balancing losses are evaluated on", ge=16
    )
