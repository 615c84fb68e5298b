"""The table of bases, and how to look one up or add one."""

from __future__ import annotations

import difflib

from dmp_common import bases
from dmp_common.bases.base import Base
from dmp_common.errors import PatchError

_BASES: dict[str, Base] = {}

# The sizes of DiT (Peebles and Xie 2023, Table 1): depth and width.
_DIT_SIZES = {"s": (12, 384), "b": (12, 768), "l": (24, 1024), "xl": (28, 1152)}


def register_base(base: Base) -> Base:
    """Adds a base to the table, so that patches for it can be made, saved and loaded.

    Raises:
        PatchError: the name is taken by another base.
    """
    if _BASES.get(base.name, base) != base:
        raise PatchError(
            f"a base named {base.name!r} exists already and differs: choose another name."
        )
    _BASES[base.name] = base
    return base


def get_base(name: str) -> Base:
    """The base of a name.

    Raises:
        PatchError: an unknown name; the message lists the known ones.
    """
    if name in _BASES:
        return _BASES[name]
    near = difflib.get_close_matches(name, _BASES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise PatchError(
        f"expected the name of a base, found {name!r}{hint}; known bases: {', '.join(_BASES)}."
    )


def known_bases() -> tuple[Base, ...]:
    """All bases, in the order of the table."""
    return tuple(_BASES.values())


def _fill() -> None:
    register_base(
        bases.dit(
            "digits",
            depth=6,
            width=64,
            patch_size=2,
            in_channels=1,
            frequency_shift=1.0,  # the bundled base was trained in diffusers
            grid=(4, 4),
            architecture="digits",
        )
    )
    for name, width, grid in (("cifar10", 96, 8), ("cifar10-s", 64, 4)):  # of training/miniature
        register_base(
            bases.dit(
                name,
                depth=6,
                width=width,
                patch_size=4,
                in_channels=3,
                frequency_shift=1.0,
                grid=(grid, grid),
                architecture=name,
            )
        )
    register_base(
        bases.unet(
            "sd15",
            widths=(320, 640, 1280, 1280),
            context=768,
            attention=(True, True, True, False),
            architecture="stable-diffusion-v1",
            hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        )
    )
    register_base(
        bases.unet(
            "sd21",
            widths=(320, 640, 1280, 1280),
            context=1024,
            attention=(True, True, True, False),
            prediction="v_prediction",
            architecture="stable-diffusion-v2-768-v",
            hub_id="stabilityai/stable-diffusion-2-1",
        )
    )
    register_base(
        bases.unet(
            "sdxl",
            widths=(320, 640, 1280),
            context=2048,
            attention=(False, True, True),
            architecture="stable-diffusion-xl-v1-base",
            hub_id="stabilityai/stable-diffusion-xl-base-1.0",
        )
    )
    for size, (depth, width) in _DIT_SIZES.items():
        for patch_size in (2, 4, 8):
            register_base(
                bases.dit(
                    f"dit-{size}/{patch_size}",
                    depth=depth,
                    width=width,
                    patch_size=patch_size,
                    hub_id="facebook/DiT-XL-2-256" if (size, patch_size) == ("xl", 2) else None,
                )
            )
    register_base(
        bases.pixart(
            "pixart", depth=28, width=1152, hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
        )
    )
    for name, depth, width, dual, repository in (
        ("sd3", 24, 1536, False, "stable-diffusion-3-medium-diffusers"),
        ("sd35-medium", 24, 1536, True, "stable-diffusion-3.5-medium"),
        ("sd35-large", 38, 2432, False, "stable-diffusion-3.5-large"),
    ):
        register_base(
            bases.sd3(name, depth=depth, width=width, dual=dual, hub_id=f"stabilityai/{repository}")
        )
    register_base(
        bases.flux("flux", double=19, single=38, width=3072, hub_id="black-forest-labs/FLUX.1-dev")
    )
    register_base(bases.qwen_image("qwen-image", depth=60, width=3072, hub_id="Qwen/Qwen-Image"))
    register_base(bases.z_image("z-image", depth=30, width=3840, hub_id="Tongyi-MAI/Z-Image-Turbo"))
    register_base(
        bases.lumina2("lumina2", depth=26, width=2304, hub_id="Alpha-VLLM/Lumina-Image-2.0")
    )


_fill()
