"""Recognises models of families that are not supported, so that they are refused by name.

Many families are built from the blocks of another one. Their sites have the names and widths of a
base, and a patch would act on them without being made for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn

from dmp_common.bases.base import Probe, find_module
from dmp_common.bases.layerfacts import attribute_of
from dmp_common.bases.otherfamilies import OTHER_FAMILIES, Stranger

# The first family that fits is named, so siblings come before the family that they derive from.
STRANGERS: tuple[Stranger, ...] = (
    Stranger(
        "a ControlNet",
        (
            (Probe("controlnet_blocks", None, True),),
            (Probe("controlnet_down_blocks", None, True),),
            (Probe("zero_convs", None, True),),
        ),
    ),
    # It has SDXL's UNet, but takes the text of ChatGLM, which the width of the pooled text shows.
    # `encoder_hid_proj` is no sign, because an IP-Adapter replaces it.
    Stranger(
        "Kolors",
        (
            (Probe("add_embedding.linear_1", "in_features", 5632),),
            (Probe("label_emb.0.0", "in_features", 5632),),
        ),
    ),
    # These are SDXL without some blocks, among them the attention in the middle.
    Stranger(
        "SSD-1B or Segmind Vega",
        (
            (
                Probe("conv_in", "out_channels", 320),
                Probe("down_blocks.2.attentions", None, True),
                Probe("down_blocks.3", None, False),
                Probe("mid_block.resnets.0", None, True),
                Probe("mid_block.attentions.0", None, False),
            ),
            (
                Probe("input_blocks.0.0", "out_channels", 320),
                Probe("input_blocks.8.1", None, True),
                Probe("input_blocks.9", None, False),
                Probe("middle_block.0", None, True),
                Probe("middle_block.1", None, False),
            ),
        ),
    ),
    Stranger(
        "the SDXL refiner",
        (
            (
                Probe("conv_in", "out_channels", 384),
                Probe("add_embedding.linear_1", "in_features", 2560),
            ),
            (
                Probe("input_blocks.0.0", "out_channels", 384),
                Probe("label_emb.0.0", "in_features", 2560),
            ),
        ),
    ),
    Stranger(
        "Stable Video Diffusion",
        (
            (Probe("down_blocks.0.resnets.0.spatial_res_block", None, True),),
            (Probe("input_blocks.1.0.time_stack", None, True),),
        ),
        classes=("UNetSpatioTemporalConditionModel",),
    ),
    Stranger(
        "a text-to-video UNet (ModelScope, Zeroscope, I2VGen-XL)",
        ((Probe("down_blocks.0.temp_convs", None, True),),),
        classes=("UNet3DConditionModel", "I2VGenXLUNet"),
    ),
    Stranger(
        "DreamLite",
        ((Probe("mid_block.attentions.0.transformer_blocks.0.attn1.norm_q", None, True),),),
        classes=("DreamLiteUNetModel",),
    ),
    Stranger(
        "Z-Image in pixel space",
        ((Probe("dec_net", None, True), Probe("cap_embedder", None, True)),),
    ),
    Stranger("Z-Image Omni", ((Probe("siglip_embedder", None, True),),)),
    Stranger("NewBie", ((Probe("clip_text_pooled_proj", None, True),),)),
    Stranger(
        "Qwen-Image-Layered",
        ((Probe("time_text_embed.addition_t_embedding", None, True),),),
    ),
    *OTHER_FAMILIES,
)


def find_stranger(holds: Callable[[Probe], bool], kind: str = "") -> Stranger | None:
    """Returns the unsupported family that a model is of, or None where no known one fits.

    Args:
        holds: whether a probe holds for the model.
        kind: name of the denoiser's class, where there is one.
    """
    for stranger in STRANGERS:
        if kind in stranger.others:
            continue
        if kind in stranger.classes or any(all(map(holds, sign)) for sign in stranger.signs):
            return stranger
    return None


def stranger_of(denoiser: nn.Module) -> Stranger | None:
    """Returns the unsupported family that a denoiser is of, or None where no known one fits."""
    return find_stranger(lambda probe: holds(denoiser, probe), type(denoiser).__name__)


def stranger_of_pipeline(pipeline: str) -> Stranger | None:
    """Returns the unsupported family that a pipeline is of, by the name of its class in diffusers;
    None where only its denoiser tells."""
    if not pipeline.endswith("Pipeline"):
        return None
    return next((s for s in STRANGERS if pipeline.startswith(s.pipelines)), None)


def holds(denoiser: nn.Module, probe: Probe) -> bool:
    """Tells whether a probe holds for a denoiser."""
    module = find_module(denoiser, probe.path)
    if probe.attribute is None:
        return (module is not None) == probe.value
    return module is not None and attribute_of(module, probe.attribute) == probe.value
