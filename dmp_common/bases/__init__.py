"""Says what a model family is, as data: its sites, its time embedding, how it is recognised.

A file for each kind of family (`unet`, `transformer`, `flux`, `llm`) has the rows that turn a few
numbers into a `Base`, and the functions that this family alone needs; `table` lists the numbers.
For a model of your own, make a row and take its base: `Flux("mine", 2, 2, 32).base()`, or call the
function of the family that does both.
"""

from dmp_common.bases.chroma import chroma
from dmp_common.bases.flux import flux
from dmp_common.bases.krea2 import krea2
from dmp_common.bases.llm import lumina2, qwen_image, z_image
from dmp_common.bases.qwenimage21 import qwen_image21
from dmp_common.bases.transformer import dit, pixart, sd3
from dmp_common.bases.unet import unet

__all__ = [
    "chroma",
    "dit",
    "flux",
    "krea2",
    "lumina2",
    "pixart",
    "qwen_image",
    "qwen_image21",
    "sd3",
    "unet",
    "z_image",
]
