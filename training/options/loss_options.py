"""Options of the objective: timesteps, the noise that is added, and the loss with its weights.

Names and meanings are those of kohya's scripts. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from training.options.declaring import Options, option

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
TimestepSampling = Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
HuberSchedule = Literal["snr", "exponential", "constant"]


class LossOptions(Options):
    """How noise is made for training, and how far a prediction is from its target."""

    loss_type: LossType = option(
        "objective",
        "l2",
        "Measure the distance between prediction and target like this: l2 is the squared error, "
        "l1 the absolute error; huber and smooth_l1 are squared for small errors and absolute "
        "for large ones.",
    )
    huber_c: float = option(
        "objective",
        0.1,
        "Let huber and smooth_l1 turn from squared to absolute at this error; the schedule "
        "changes it over the timesteps.",
        gt=0,
    )
    huber_schedule: HuberSchedule = option(
        "objective",
        "snr",
        "Choose how that error depends on the timestep: constant is --huber_c everywhere; snr "
        "and exponential fall from 1 without noise to --huber_c at pure noise.",
    )
    huber_scale: float = option(
        "objective",
        1.0,
        "Multiply that error by this factor, for --huber_schedule constant and exponential.",
        gt=0,
    )
    masked_loss: bool = option(
        "objective",
        False,
        "Multiply the loss by the masks of the images, so that black places are not learned; the "
        "masks come from conditioning_data_dir in the data set file, or from --alpha_mask.",
    )
    noise_offset: float = option(
        "objective",
        0.0,
        "Add noise of this strength that is constant over the picture; 0 disables it.",
        ge=0,
        le=1,
    )
    noise_offset_random_strength: bool = option(
        "objective",
        False,
        "Draw the strength of the noise offset of each image between 0 and --noise_offset.",
    )
    adaptive_noise_scale: float = option(
        "objective",
        0.0,
        "Add this factor times the absolute mean of each latent channel to the strength of the "
        "noise offset; 0 disables it, and the strength never falls below 0.",
    )
    multires_noise_iterations: int = option(
        "objective",
        0,
        "Add noise at this many resolutions, each two to four times coarser than the one before "
        "(6 to 10 is usual); 0 disables it.",
        ge=0,
        le=100,
    )
    multires_noise_discount: float = option(
        "objective",
        0.3,
        "Multiply the noise of each coarser resolution by this factor once more.",
        ge=0,
        le=1,
    )
    ip_noise_gamma: float = option(
        "objective",
        0.0,
        "Perturb the model's input by further noise of this strength, which the target does not "
        "know (0.1 is usual); 0 disables it.",
        ge=0,
    )
    ip_noise_gamma_random_strength: bool = option(
        "objective",
        False,
        "Draw the strength of the input perturbation of each image between 0 and --ip_noise_gamma.",
    )


class ObjectiveOptions(LossOptions):
    """What the prediction is compared with, at which timesteps, with which weight."""

    v_parameterization: bool = option(
        "objective",
        False,
        "Take the base for one that predicts v. It is needed only where the configuration of "
        "its scheduler does not say so.",
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
    p2_k: float = option("objective", 1.0, "Use this constant k in --p2_gamma.", gt=0)
    relative_loss: bool = option(
        "objective",
        False,
        "Weight timesteps by 1 / the loss of the base there, measured first on training images: an "
        "improvement by 1% counts the same at every noise level.",
    )
    variational_weight: float = option(
        "objective",
        1.0,
        "Give the variational term this weight, for bases that learn sigma; 0 disables it.",
        ge=0,
    )
    min_timestep: int = option(
        "objective",
        0,
        "Train from this timestep on; the patch is off below it.",
        ge=0,
        le=999,
    )
    max_timestep: int = option(
        "objective",
        1000,
        "Train up to this timestep, without it; the patch is off from it on.",
        ge=1,
        le=1000,
    )
    timestep_sampling: TimestepSampling = option(
        "objective",
        "sigma",
        "Choose how timesteps of flow models are drawn; sigma draws as --weighting_scheme says "
        "and then shifts them.",
    )
    weighting_scheme: WeightingScheme = option(
        "objective",
        "none",
        "Choose the density (logit_normal, mode) or weight (sigma_sqrt, cosmap) of the "
        "timesteps of flow models.",
    )
    logit_mean: float = option(
        "objective", 0.0, "Use this mean in --weighting_scheme logit_normal."
    )
    logit_std: float = option(
        "objective", 1.0, "Use this standard deviation in --weighting_scheme logit_normal.", gt=0
    )
    mode_scale: float = option("objective", 1.29, "Use this scale in --weighting_scheme mode.")
    sigmoid_scale: float = option(
        "objective",
        1.0,
        "Use this scale in --timestep_sampling sigmoid, shift and flux_shift.",
        gt=0,
    )
    discrete_flow_shift: float | None = option(
        "objective",
        None,
        "Shift the timesteps of flow models by this factor. By default it is that of the "
        "scheduler.",
        gt=0,
    )
    importance_weight: float = option(
        "objective",
        0.0,
        "Give the importance loss, which balances the prompts, this weight; 0 disables it.",
        ge=0,
    )
    load_weight: float = option(
        "objective",
        0.0,
        "Give the load loss, which balances the prompts, this weight; 0 disables it.",
        ge=0,
    )
    gate_noise: bool = option(
        "objective",
        False,
        "Add Gaussian noise of a learned size to the gate's output before the softmax, in training "
        "alone, as the official code does. Neither validation nor the file has it.",
    )
    balancing_timesteps: int = option(
        "objective", 16, "Evaluate the balancing losses at this many timesteps.", ge=16
    )
