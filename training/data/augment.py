"""Changes of colour, drawn for each image and epoch. Mirroring and cropping need no library."""

from __future__ import annotations

from torch import Tensor

from dmp_common import PatchError
from training.data import draws

_HUE = 0.04  # of a full turn, to either side: kohya's 8 of 180 degrees, about
_GAMMA = (0.95, 1.05)


def require_kornia() -> None:
    """Raises:
    PatchError: kornia is not installed.
    """
    try:
        import kornia.enhance  # noqa: F401
    except ImportError as error:
        raise PatchError(
            "expected kornia for color_aug, found it is not installed: run pip install kornia, or "
            "leave out color_aug."
        ) from error


def vary_color(pixels: Tensor, *draw: object) -> Tensor:
    """Hue and gamma of pixels (3, H, W) in [-1, 1], a little off."""
    from kornia.enhance import adjust_gamma, adjust_hue  # slow to import

    hue = (draws.uniform(*draw, "hue") * 2 - 1) * _HUE
    gamma = _GAMMA[0] + draws.uniform(*draw, "gamma") * (_GAMMA[1] - _GAMMA[0])
    unit = adjust_hue((pixels / 2 + 0.5)[None], hue * 2 * 3.141592653589793)
    return (adjust_gamma(unit, gamma)[0].clamp(0, 1) * 2 - 1).contiguous()
