"""What a model family is, as data: its sites, its time embedding, how it is recognised.

A file for each kind of family (`unet`, `transformer`, `flux`, `llm`) has the rows that turn a few
numbers into a `Base`, and the functions that this family alone needs; `table` lists the numbers.
"""

from dmp_common.bases.flux import Flux, flux
from dmp_common.bases.llm import Lumina2, QwenImage, ZImage, lumina2, qwen_image, z_image
from dmp_common.bases.transformer import SD3, DiT, PixArt, dit, pixart, sd3
from dmp_common.bases.unet import Unet, unet

__all__ = [
    "SD3",
    "DiT",
    "Flux",
    "Lumina2",
    "PixArt",
    "QwenImage",
    "Unet",
    "ZImage",
    "dit",
    "flux",
    "lumina2",
    "pixart",
    "qwen_image",
    "sd3",
    "unet",
    "z_image",
]
