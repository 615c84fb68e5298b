"""The noising process of a base: how clean data become noisy, and what the model is to predict.

Times t are on the scale 0..1000 everywhere; a flow model's sigma is t / 1000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from dmp_common import PatchError
from training.base.schedulers import flux_shift, is_flow, token_count
from training.objective.variational import Posterior, variational_term
from training.options.loss_options import ObjectiveOptions


class Discrete:
    """Noise of a DDPM schedule: x = sqrt(a) x0 + sqrt(1 - a) noise, with a table of a.

    Args:
        scheduler: diffusers scheduler with `alphas_cumprod`; its config names the prediction.
        options: the prediction's timesteps and weights.
    """

    def __init__(self, scheduler: SchedulerMixin, options: ObjectiveOptions) -> None:
        self.prediction = str(scheduler.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise PatchError(
                "expected prediction type epsilon, v_prediction or sample in the scheduler's "
                f"config, found {self.prediction!r}: correct the base's configuration."
            )
        self.options, self.scheduler = options, scheduler
        self.alphas = scheduler.alphas_cumprod.double()  # (T,)
        self.posterior = Posterior(scheduler.betas.double())

    def times(self, u: Tensor, z: Tensor, sizes: Sequence[int]) -> Tensor:
        """Timesteps (B,), int64, uniform over the range asked for; z is for flow models."""
        first, end = self.options.min_timestep, min(self.options.max_timestep, len(self.alphas))
        return (first + (u.double() * (end - first)).long()).clamp(max=end - 1)

    def bin(self, number: int, bins: int, u: Tensor) -> Tensor:
        """Timesteps (B,) in one of `bins` equal ranges, least noisy first, for validation."""
        steps = len(self.alphas)
        first, end = number * steps // bins, max((number + 1) * steps // bins, 1)
        return (first + (u.double() * (end - first)).long()).clamp(max=end - 1)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy data like clean (B, C, H, W) at timesteps t (B,)."""
        signal, rest = self._scales(clean, t)
        return signal * clean + rest * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target (B, C, H, W) of the model's prediction."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        signal, rest = self._scales(clean, t)
        return signal * noise - rest * clean

    def clean_from(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean data (B, C, H, W) that a prediction means."""
        signal, rest = self._scales(noisy, t)
        if self.prediction == "sample":
            return prediction
        if self.prediction == "epsilon":
            return (noisy - rest * prediction) / signal
        return signal * noisy - rest * prediction

    def variational(
        self, clean: Tensor, noisy: Tensor, prediction: Tensor, sigma: Tensor, t: Tensor
    ) -> Tensor | None:
        """The variational term (B, C, H, W) of a learned variance, see `variational_term`."""
        means = self.clean_from(prediction, noisy, t)
        return variational_term(self.posterior, clean, means, noisy, sigma, t)

    def signal_share(self, t: Tensor) -> Tensor:
        """The scale of the signal over the sum of both scales, (B,) float32: 1 without noise."""
        alphas = self.alphas.to(t.device)[t]
        return (alphas.sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())).float()

    def weights(self, t: Tensor) -> Tensor:
        """Weights of the squared error at timesteps t (B,), float32.

        Sources: Hang et al. 2023 (min-SNR), Yu et al. 2023 (debiased), Choi et al. 2022 (P2).
        """
        options = self.options
        if not (options.min_snr_gamma or options.debiased_estimation_loss or options.p2_gamma):
            return torch.ones_like(t, dtype=torch.float32)
        alphas, snr = self.alphas.to(t.device), self._snr.to(t.device)
        # Zero at the last step of a zero-terminal-SNR schedule: weights take their limits there.
        of_velocity = 1 / (snr + 1) if self.prediction == "v_prediction" else torch.ones_like(snr)
        if options.min_snr_gamma:
            capped = snr.clamp(max=options.min_snr_gamma)
            weights = {
                "epsilon": (capped / snr).where(snr > options.min_snr_gamma, 1.0),
                "v_prediction": capped * of_velocity,
                "sample": capped,
            }[self.prediction]
        elif options.debiased_estimation_loss:
            # As in kohya's scripts: 1 / (SNR + 1) for v; SNR at most 1000.
            least = float(snr[snr > 0].min())
            weights = snr.clamp(least, 1000.0).rsqrt()
            if self.prediction == "v_prediction":
                weights = of_velocity
        else:
            # Defined on the error of epsilon, which is sqrt(a) that of v, and sqrt(SNR) of x0.
            error = {
                "epsilon": torch.ones_like(snr),
                "v_prediction": alphas,
                "sample": snr,
            }[self.prediction]
            weights = error / (options.p2_k + snr) ** (options.p2_gamma or 0.0)
        return weights[t].float()

    @cached_property
    def _snr(self) -> Tensor:
        """Signal-to-noise ratio of every timestep (T,), float64."""
        from diffusers.training_utils import compute_snr  # takes seconds

        snr: Tensor = compute_snr(self.scheduler, torch.arange(len(self.alphas)))
        return snr.double()

    def _scales(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas.to(t.device)[t].reshape(-1, 1, 1, 1)
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)


class Flow:
    """Rectified flow: x = (1 - sigma) x0 + sigma noise; the model predicts noise - x0.

    Args:
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler, for its shift.
        options: the prediction's timesteps and weights.
        side: cells of the latent in a side of a token.
    """

    prediction = "flow"

    def __init__(self, scheduler: SchedulerMixin, options: ObjectiveOptions, side: int = 2) -> None:
        config = scheduler.config
        own = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
        self.shift = options.discrete_flow_shift or own
        self.options, self.side = options, side

    def times(self, u: Tensor, z: Tensor, sizes: Sequence[int]) -> Tensor:
        """Times (B,), float32, from uniform u (B,) and standard normal z (B,), for latents of these
        sizes: height and width, of videos the number of frames before them.

        The densities are those of kohya's scripts and diffusers' SD3 training, also in that
        `sigma` counts from the noisy end, as an index into a scheduler's timesteps does.
        """
        options = self.options
        match options.timestep_sampling:
            case "uniform":
                sigma = u
            case "sigmoid":
                sigma = torch.sigmoid(options.sigmoid_scale * z)
            case "shift":
                sigma = self._shifted(torch.sigmoid(options.sigmoid_scale * z), self.shift)
            case "flux_shift":
                shift = math.exp(flux_shift(token_count(sizes, self.side)))
                sigma = self._shifted(torch.sigmoid(options.sigmoid_scale * z), shift)
            case "sigma":
                sigma = self._shifted(1 - self._density(u, z), self.shift)
        low, high = options.min_timestep / 1000, options.max_timestep / 1000
        return (1000 * (low + (high - low) * sigma)).clamp(1.0, 1000.0).float()

    def bin(self, number: int, bins: int, u: Tensor) -> Tensor:
        """Times (B,) in one of `bins` equal ranges, least noisy first, for validation."""
        return (1000 * (number + u) / bins).clamp(1.0, 1000.0).float()

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy data like clean (B, C, H, W) at times t (B,)."""
        sigma = self._sigma(clean, t)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target (B, C, H, W) of the model's prediction."""
        return noise - clean

    def variational(
        self, clean: Tensor, noisy: Tensor, prediction: Tensor, sigma: Tensor, t: Tensor
    ) -> Tensor | None:
        """None: the reverse process of a flow model has no variance to learn."""
        return None

    def signal_share(self, t: Tensor) -> Tensor:
        """The scale of the signal over the sum of both scales, (B,) float32: 1 without noise."""
        return 1 - t.float() / 1000

    def weights(self, t: Tensor) -> Tensor:
        """Weights of the squared error at times t (B,), float32 (Esser et al. 2024)."""
        sigma, scheme = t.float() / 1000, self.options.weighting_scheme
        if scheme not in ("sigma_sqrt", "cosmap"):  # the others are densities, or nothing
            return torch.ones_like(sigma)
        from diffusers.training_utils import compute_loss_weighting_for_sd3  # takes seconds

        weights: Tensor = compute_loss_weighting_for_sd3(scheme, sigma)
        return weights

    def _density(self, u: Tensor, z: Tensor) -> Tensor:
        """The density of --weighting_scheme, as a function of draws that are already made.

        `compute_density_for_timestep_sampling` of diffusers has the same formulas, but draws for
        a whole batch from one generator: a sample's timestep would depend on the others, and a
        resumed run or another number of processes would train on other timesteps.
        """
        options = self.options
        if options.weighting_scheme == "logit_normal":
            return torch.sigmoid(options.logit_mean + options.logit_std * z)
        if options.weighting_scheme == "mode":
            return 1 - u - options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u

    def _shifted(self, sigma: Tensor, shift: float) -> Tensor:
        return shift * sigma / (1 + (shift - 1) * sigma)

    def _sigma(self, like: Tensor, t: Tensor) -> Tensor:
        return (t.float() / 1000).reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


Process = Discrete | Flow
# Options that weight timesteps by the SNR, or change what the noise at the noisiest one is.
_DISCRETE_ONLY = (
    *("min_snr_gamma", "debiased_estimation_loss", "p2_gamma"),
    *("noise_offset", "adaptive_noise_scale", "multires_noise_iterations"),
)


def process_of(scheduler: SchedulerMixin, options: ObjectiveOptions, side: int = 2) -> Process:
    """The process a scheduler describes.

    Args:
        scheduler: of the base.
        options: of the run.
        side: cells of a flow model's latent in a side of a token.

    Raises:
        PatchError: an unknown prediction type, or options that the process does not have.
    """
    flow = is_flow(scheduler)
    require_process(flow, options)
    return Flow(scheduler, options, side) if flow else Discrete(scheduler, options)


def require_process(flow: bool, options: ObjectiveOptions) -> None:
    """Refuses options that the process of a base does not have.

    Args:
        flow: whether the base is a flow model.
        options: of the run.

    Raises:
        PatchError: there are such options.
    """
    if options.relative_loss and options.loss_type != "l2":
        raise PatchError(
            "expected --loss_type l2 with --relative_loss, whose weights are the base's squared "
            f"error, found {options.loss_type}: leave out one of them."
        )
    wrong = [name for name in _DISCRETE_ONLY if getattr(options, name)]
    if flow and wrong:
        raise PatchError(
            "expected a base with epsilon or v prediction for "
            f"{', '.join('--' + name for name in wrong)}, found a flow model: use "
            "--weighting_scheme and --timestep_sampling."
        )
