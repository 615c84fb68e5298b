"""The bases: lookup and detection."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
import torch.nn as nn

import dmp_common as dmp
from dmp_common import Patch, PatchError, detect_base, get_base, known_bases
from tests.tiny import FAMILIES

ORDER = ["digits", "cifar10", "cifar10-s", "sd15", "sd21", "sdxl"]
ORDER += [f"dit-{size}/{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)]
ORDER += ["pixart", "sd3", "sd35-medium", "sd35-large", "flux"]
ORDER += ["flux2", "flux2-klein-4b", "flux2-klein-9b", "qwen-image", "z-image", "lumina2"]
ORDER += ["chroma", "ernie-image", "krea2", "anima", "qwen-image-2.1"]
ORDER += ["wan-1.3b", "wan-14b", "wan21-i2v-14b", "wan22-i2v-14b", "wan22-5b"]


def test_known_bases_and_their_order():
    assert [base.name for base in known_bases()][: len(ORDER)] == ORDER
    assert all(get_base(name).name == name for name in ORDER)


def test_unknown_base_lists_the_known():
    with pytest.raises(PatchError) as error:
        get_base("sd51")
    for name in ORDER:
        assert name in str(error.value)
    assert "'sd51'" in str(error.value)
    assert "did you mean" in str(error.value)
    with pytest.raises(PatchError, match="expected the name of a base, found 'zzzz'; known"):
        get_base("zzzz")
    with pytest.raises(PatchError, match="known bases"):
        Patch.create("nothing like it")


def test_a_name_is_registered_once():
    base = get_base("sd15")
    assert dmp.register_base(base) is base
    with pytest.raises(PatchError, match="'sd15' exists already"):
        dmp.register_base(
            FAMILIES["sd15"].base.__class__(**{**vars(get_base("sd21")), "name": "sd15"})
        )


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


STRANGERS = {
    "linear": (lambda: nn.Linear(2, 2), ["Linear", "no module of a known base"]),
    "vae": (lambda: diffusers.AutoencoderKL(), ["AutoencoderKL"]),
    "narrow-unet": (
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(128, 256, 512, 512), cross_attention_dim=768
        ),
        ["UNet2DConditionModel", "conv_in.out_channels = 128", "512"],
    ),
    "dit-depth": (
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, num_layers=27
        ),
        ["DiTTransformer2DModel", "pos_embed.proj.out_channels = 1152"],
    ),
    "one-level-more": (
        lambda: diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280, 1280),
            cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2 + ("CrossAttnUpBlock2D",) * 3,
        ),
        ["UNet2DConditionModel"],
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_model_of_no_base_is_described(stranger):
    build, facts = STRANGERS[stranger]
    with pytest.raises(PatchError) as error:
        detect_base(_on_meta(build))
    for fact in [*facts, *ORDER]:
        assert fact in str(error.value)


def test_siblings_of_a_base_are_of_the_base():
    """An inpainting UNet has nine input channels and the same sites, and so has FLUX Fill."""
    inpainting = _on_meta(
        lambda: diffusers.UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
    )
    assert detect_base(inpainting).name == "sd15"
    flux = FAMILIES["flux"].model()
    flux.x_embedder = torch.nn.Linear(96, flux.x_embedder.out_features)
    assert detect_base(flux).name == "tiny-flux"
