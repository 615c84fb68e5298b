"""Builders of bases: one function a model family, from its few numbers to a `Base`."""

from dmp_common.families.llm import lumina2, qwen_image, z_image
from dmp_common.families.transformer import dit, flux, pixart, sd3
from dmp_common.families.unet import unet

__all__ = ["dit", "flux", "lumina2", "pixart", "qwen_image", "sd3", "unet", "z_image"]
