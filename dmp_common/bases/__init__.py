"""What a model family is, as data: its sites, its time embedding, how it is recognised.

A file for each kind of family (`unet`, `transformer`, `llm`) has the functions that turn a few
numbers into a `Base`; `table` lists the numbers.
"""

from dmp_common.bases.llm import lumina2, qwen_image, z_image
from dmp_common.bases.transformer import dit, flux, pixart, sd3
from dmp_common.bases.unet import unet

__all__ = ["dit", "flux", "lumina2", "pixart", "qwen_image", "sd3", "unet", "z_image"]
