"""Options about the noise that is added and the loss that compares the prediction with its target.

Names and meanings are those of kohya's scripts. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from training.options.declaring import Options, option

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
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
