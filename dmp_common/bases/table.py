"""The table of bases, and how to look one up or add one."""

from __future__ import annotations

import difflib

from dmp_common.bases.anima import Anima
from dmp_common.bases.auraflow import AuraFlow
from dmp_common.bases.base import Base, Row
from dmp_common.bases.chroma import Chroma
from dmp_common.bases.ernie import ErnieImage
from dmp_common.bases.flux import Flux, Flux2
from dmp_common.bases.hunyuanimage import HunyuanImage
from dmp_common.bases.krea2 import Krea2
from dmp_common.bases.llm import Lumina2, QwenImage, ZImage
from dmp_common.bases.qwenimage21 import QwenImage21
from dmp_common.bases.sana import Sana
from dmp_common.bases.transformer import SD3, DiT, PixArt
from dmp_common.bases.unet import Unet
from dmp_common.bases.wan import Wan
from dmp_common.errors import PatchError

TABLE: tuple[Row, ...] = (
    # The bundled base, and two of training/experiments/miniature. They were trained in
    # diffusers: shift 1.
    DiT(
        "digits",
        depth=6,
        width=64,
        patch_size=2,
        in_channels=1,
        frequency_shift=1.0,
        grid=(4, 4),
        architecture="digits",
    ),
    DiT(
        "cifar10",
        depth=6,
        width=96,
        patch_size=4,
        in_channels=3,
        frequency_shift=1.0,
        grid=(8, 8),
        architecture="cifar10",
    ),
    DiT(
        "cifar10-s",
        depth=6,
        width=64,
        patch_size=4,
        in_channels=3,
        frequency_shift=1.0,
        grid=(4, 4),
        architecture="cifar10-s",
    ),
    Unet(
        "sd15",
        widths=(320, 640, 1280, 1280),
        context=768,
        attention=(True, True, True, False),
        architecture="stable-diffusion-v1",
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Unet(
        "sd21",
        widths=(320, 640, 1280, 1280),
        context=1024,
        attention=(True, True, True, False),
        linear=True,
        prediction="v_prediction",
        architecture="stable-diffusion-v2-768-v",
        hub_id="stabilityai/stable-diffusion-2-1",
    ),
    Unet(
        "sdxl",
        widths=(320, 640, 1280),
        context=2048,
        attention=(False, True, True),
        pooled=2816,
        depth=10,
        transformers=(1, 2, 10),
        linear=True,
        architecture="stable-diffusion-xl-v1-base",
        hub_id="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    # The sizes of DiT: Peebles and Xie 2023, Table 1.
    DiT("dit-s/2", depth=12, width=384, patch_size=2),
    DiT("dit-s/4", depth=12, width=384, patch_size=4),
    DiT("dit-s/8", depth=12, width=384, patch_size=8),
    DiT("dit-b/2", depth=12, width=768, patch_size=2),
    DiT("dit-b/4", depth=12, width=768, patch_size=4),
    DiT("dit-b/8", depth=12, width=768, patch_size=8),
    DiT("dit-l/2", depth=24, width=1024, patch_size=2),
    DiT("dit-l/4", depth=24, width=1024, patch_size=4),
    DiT("dit-l/8", depth=24, width=1024, patch_size=8),
    DiT("dit-xl/2", depth=28, width=1152, patch_size=2, hub_id="facebook/DiT-XL-2-256"),
    DiT("dit-xl/4", depth=28, width=1152, patch_size=4),
    DiT("dit-xl/8", depth=28, width=1152, patch_size=8),
    PixArt("pixart", depth=28, width=1152, hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    SD3(
        "sd3",
        depth=24,
        width=1536,
        dual=False,
        hub_id="stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    SD3(
        "sd35-medium",
        depth=24,
        width=1536,
        dual=True,
        hub_id="stabilityai/stable-diffusion-3.5-medium",
    ),
    SD3(
        "sd35-large",
        depth=38,
        width=2432,
        dual=False,
        hub_id="stabilityai/stable-diffusion-3.5-large",
    ),
    Flux("flux", double=19, single=38, width=3072, hub_id="black-forest-labs/FLUX.1-dev"),
    Flux2("flux2", double=8, single=48, width=6144, hub_id="black-forest-labs/FLUX.2-dev"),
    Flux2(
        "flux2-klein-4b",
        double=5,
        single=20,
        width=3072,
        hub_id="black-forest-labs/FLUX.2-klein-4B",
    ),
    Flux2(
        "flux2-klein-9b",
        double=8,
        single=24,
        width=4096,
        hub_id="black-forest-labs/FLUX.2-klein-9B",
    ),
    QwenImage("qwen-image", depth=60, width=3072, hub_id="Qwen/Qwen-Image"),
    ZImage("z-image", depth=30, width=3840, hub_id="Tongyi-MAI/Z-Image-Turbo"),
    Lumina2("lumina2", depth=26, width=2304, hub_id="Alpha-VLLM/Lumina-Image-2.0"),
    Chroma("chroma", double=19, single=38, width=3072, hub_id="lodestones/Chroma1-HD"),
    ErnieImage("ernie-image", depth=36, width=4096, hidden=12288, hub_id="baidu/ERNIE-Image"),
    Krea2("krea2", depth=28, width=6144, hub_id="krea/Krea-2-Raw"),
    Anima("anima", depth=28, width=2048, hub_id="circlestone-labs/Anima-Base-v1.0-Diffusers"),
    QwenImage21("qwen-image-2.1", depth=32, width=4096, hub_id="Qwen/Qwen-Image-2.1"),
    Wan("wan-1.3b", 30, 1536, 8960, hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    # Wan 2.1, and both experts of Wan 2.2 A14B, which have its architecture.
    Wan("wan-14b", 40, 5120, 13824, switch=875.0, hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    Wan(
        "wan21-i2v-14b",
        depth=40,
        width=5120,
        hidden=13824,
        channels=36,
        pictures=True,
        hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    ),
    Wan(
        "wan22-i2v-14b",
        depth=40,
        width=5120,
        hidden=13824,
        channels=36,
        switch=900.0,
        hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    ),
    Wan("wan22-5b", 30, 3072, 14336, channels=48, hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    AuraFlow("auraflow", double=4, single=32, width=3072, hub_id="fal/AuraFlow-v0.3"),
    HunyuanImage(
        "hunyuan-image",
        double=20,
        single=40,
        width=3584,
        hub_id="hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
    ),
    Sana("sana", 20, 2240, hub_id="Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    Sana("sana-0.6b", 28, 1152, hub_id="Efficient-Large-Model/Sana_600M_1024px_diffusers"),
)

_registered: dict[str, Base] = {}
_cache: dict[str, Base] = {}  # the bases of rows that have been asked for


def register_base(base: Base) -> Base:
    """Adds a base of your own, so that patches for it can be made, saved and loaded.

    Raises:
        PatchError: the name is taken by another base.
    """
    known = _find(base.name)
    if known is None:
        _registered[base.name] = base
    elif known != base:
        raise PatchError(
            f"a base named {base.name!r} exists already and differs: choose another name."
        )
    return base


def get_base(name: str) -> Base:
    """Returns the base of a name.

    Raises:
        PatchError: an unknown name; the message lists the known ones.
    """
    found = _find(name)
    if found is not None:
        return found
    known = _names()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise PatchError(
        f"expected the name of a base, found {name!r}{hint}; known bases: {', '.join(known)}."
    )


def known_bases() -> tuple[Base, ...]:
    """Returns all bases in the order of the table; registered ones come last."""
    return tuple(get_base(name) for name in _names())


def _names() -> list[str]:
    return [row.name for row in TABLE] + list(_registered)


def _find(name: str) -> Base | None:
    row = next((row for row in TABLE if row.name == name), None)
    return _registered.get(name) if row is None else _built(row)


def _built(row: Row) -> Base:
    """Returns the base of a row, which is built when it is first asked for."""
    return _cache.get(row.name) or _cache.setdefault(row.name, row.base())
