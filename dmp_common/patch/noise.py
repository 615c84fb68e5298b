"""Whether a model's noise schedule is the one that a patch was trained on, for every host.

Models with zero terminal SNR begin with pure noise, others with noise that holds a trace of a
picture. Both have the same timesteps, so that a patch runs on either.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dmp_common.patch.serialize import use_of

# No schedule without zero terminal SNR has such a sigma at its last timestep. It is 14.6 on the
# usual one of Stable Diffusion, and 4096 or more where libraries rescale it: they stop before 0.
_PURE = 1000.0


def is_pure_noise(sigma: float) -> bool:
    """Tells whether a schedule whose greatest sigma this is has zero terminal SNR."""
    return sigma > _PURE


def ends_in_pure_noise(alphas_cumprod: Tensor) -> bool:
    """Tells whether a schedule has zero terminal SNR.

    Args:
        alphas_cumprod: the shares of the picture (T,), in which sigma^2 is (1 - a) / a.
    """
    share = float(alphas_cumprod[-1])
    return share <= 0 or is_pure_noise(((1 - share) / share) ** 0.5)


def unlike_noise(metadata: Mapping[str, str], zero_terminal_snr: bool | None) -> str | None:
    """Says in a sentence that a model's noise schedule is not that of a patch's training.

    Args:
        metadata: of the patch; None is returned where it does not say.
        zero_terminal_snr: whether the model's schedule ends in pure noise; None where it is not
            known, or cannot be, as in flow models.
    """
    trained = use_of(metadata).get("zero_terminal_snr")
    if zero_terminal_snr is None or not isinstance(trained, bool) or trained == zero_terminal_snr:
        return None
    kinds = {True: "with zero terminal SNR", False: "without zero terminal SNR"}
    return (
        f"the patch was trained on a noise schedule {kinds[trained]}, and this model has one "
        f"{kinds[zero_terminal_snr]}: use a model with the schedule it was made for, or judge its "
        "pictures before you rely on it"
    )
