"""The bases: models that resemble one are named and refused, and those that are one are taken."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn as nn

from dmp_common import Patch, PatchError, attach, detect_base, get_base, known_bases
from dmp_common.bases.detect import bases_of_shapes, naming_of, require_base, stranger_of_shapes
from dmp_common.bases.strangers import STRANGERS, stranger_of
from dmp_common.tools.timefile import time_embedding_of
from tests.dmp_common.realbases import MODELS, model_of
from tests.dmp_common.test_bases_hosts import comfyui as comfyui
from tests.tiny import FAMILIES

XL = dict(
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
KOLORS = XL | dict(
    projection_class_embeddings_input_dim=5632,
    encoder_hid_dim=4096,
    encoder_hid_dim_type="text_proj",
)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def unet(**config: object) -> Callable[[], nn.Module]:
    return lambda: diffusers.UNet2DConditionModel(**config)


def default(name: str, **config: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if not hasattr(diffusers, name):
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
        unknown = config.keys() - inspect.signature(getattr(diffusers, name)).parameters.keys()
        if unknown:
            pytest.skip(f"the {name} of diffusers {diffusers.__version__} has no {unknown}")
        with warnings.catch_warnings():  # some use what diffusers itself deprecates
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(diffusers, name)(**config)

    return build


def kolors_with_adapter() -> nn.Module:
    """An IP-Adapter takes the place of the text's projection, as diffusers' loader does it."""
    model = unet(**KOLORS)()
    model.text_encoder_hid_proj = model.encoder_hid_proj
    model.encoder_hid_proj = adapter()
    return model


def adapter() -> nn.Module:
    embeddings = importlib.import_module("diffusers.models.embeddings")
    return embeddings.MultiIPAdapterImageProjection([embeddings.ImageProjection(1024, 2048)])


# What a family without support is called, a real model of it, and the base it was taken for.
REFUSED = {
    "kolors": ("Kolors", unet(**KOLORS), "sdxl"),
    "kolors-ip-adapter": ("Kolors", kolors_with_adapter, "sdxl"),
    "ssd-1b": (
        "SSD-1B or Segmind Vega",
        unet(**XL | dict(transformer_layers_per_block=(1, 2, 4), mid_block_type="UNetMidBlock2D")),
        "sdxl",
    ),
    "refiner": (
        "the SDXL refiner",
        unet(
            block_out_channels=(384, 768, 1536, 1536),
            cross_attention_dim=1280,
            down_block_types=(
                *("DownBlock2D", "CrossAttnDownBlock2D"),
                *("CrossAttnDownBlock2D", "DownBlock2D"),
            ),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2560,
        ),
        "sdxl",
    ),
    "svd": ("Stable Video Diffusion", default("UNetSpatioTemporalConditionModel"), "sd21"),
    "unet3d": ("a text-to-video UNet", default("UNet3DConditionModel"), "sd21"),
    "i2vgen": ("a text-to-video UNet", default("I2VGenXLUNet"), "sd21"),
    "dreamlite": ("DreamLite", default("DreamLiteUNetModel"), "sdxl"),
    "controlnet": ("a ControlNet", default("ControlNetModel", cross_attention_dim=768), "sd15"),
    "flux-controlnet": ("a ControlNet", default("FluxControlNetModel"), "flux"),
    "qwen-controlnet": ("a ControlNet", default("QwenImageControlNetModel"), "qwen-image"),
    "sd3-controlnet": ("a ControlNet", default("SD3ControlNetModel", num_layers=24), "sd3"),
}


@functools.cache
def stranger(name: str) -> nn.Module:
    return on_meta(REFUSED[name][1])


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_without_support_is_named_and_refused(name: str):
    family, _, base = REFUSED[name]
    model = stranger(name)
    assert [b.name for b in known_bases() if naming_of(model, b)] == []
    for refuse in (detect_base, lambda model: require_base(model, get_base(base))):
        with pytest.raises(PatchError) as error:
            refuse(model)
        assert f"found {family}" in str(error.value)
        assert f"({type(model).__name__})" in str(error.value)
        assert "not supported" in str(error.value)
        assert "patch made for this one" not in str(error.value)
    with torch.device("meta"), pytest.raises(PatchError, match=f"{base}.* not supported"):
        attach(model, Patch.create(base))


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_without_support_is_known_from_its_files(name: str):
    shapes = {k: tuple(v.shape) for k, v in stranger(name).state_dict().items()}
    assert bases_of_shapes(shapes) == []
    assert REFUSED[name][0] in stranger_of_shapes(shapes).name


def test_a_model_that_nobody_knows_is_not_told_to_load_another_patch():
    with pytest.raises(PatchError, match="found Linear .*, which is not supported: load a sd15"):
        require_base(nn.Linear(2, 2), get_base("sd15"))


def test_a_model_of_another_base_is_told_to():
    with pytest.raises(
        PatchError, match="found one of base sd21: load a sd15 .* made for this one"
    ):
        require_base(model_of("sd21"), get_base("sd15"))


def test_a_model_under_other_names_is_not_told_to_load_the_same_base():
    """Such as a model of diffusers that a custom node gives to ComfyUI."""
    with pytest.raises(PatchError, match="names of ldm, found the names of diffusers: load"):
        require_base(model_of("sd21"), get_base("sd21"), "ldm")


@pytest.mark.parametrize("name", MODELS)
def test_supported_models_are_no_strangers(name: str):
    assert stranger_of(model_of(name)) is None


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_ip_adapter_does_not_make_a_stranger(name: str):
    """It sets `encoder_hid_proj`, which Kolors has too."""
    config = {"sd15": {"cross_attention_dim": 768}, "sdxl": XL}[name]
    model = on_meta(unet(**config))
    model.encoder_hid_proj = on_meta(adapter)
    assert detect_base(model).name == name


def test_inpainting_and_consistency_models_are_siblings():
    for config in ({"in_channels": 9}, {"time_cond_proj_dim": 256}):
        assert detect_base(on_meta(unet(**XL | config))).name == "sdxl"


def test_every_stranger_can_be_recognised():
    assert all(stranger.signs or stranger.classes for stranger in STRANGERS)
    assert len({stranger.name for stranger in STRANGERS}) == len(STRANGERS)


def test_time_embeddings_are_not_read_from_a_family_without_support(tmp_path: Path):
    tiny = FAMILIES["sd15"]
    state = {key: value.contiguous() for key, value in tiny.model().state_dict().items()}
    path = tmp_path / "model.safetensors"
    patch, timesteps = tiny.patch(), torch.tensor([500.0])
    safetensors.torch.save_file(state, path)
    assert time_embedding_of(path, patch, timesteps).shape == (1, tiny.base.embedding)
    name = "down_blocks.0.temp_convs.0.conv1.0.weight"
    safetensors.torch.save_file(state | {name: torch.zeros(2)}, path)
    with pytest.raises(PatchError, match="text-to-video UNet .*, which is not supported"):
        time_embedding_of(path, patch, timesteps)


UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
}
# As ComfyUI's detection configures its own classes: family, the base it looks like, configuration.
COMFYUI = {
    "svd": (
        "Stable Video Diffusion",
        "sd21",
        UNET
        | {
            "in_channels": 8,
            "num_res_blocks": [2] * 4,
            "channel_mult": (1, 2, 4, 4),
            "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1,
            "context_dim": 1024,
            "adm_in_channels": 768,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "video_kernel_size": [3, 1, 1],
        },
    ),
    "refiner": (
        "the SDXL refiner",
        "sdxl",
        UNET
        | {
            "model_channels": 384,
            "num_res_blocks": [2] * 4,
            "channel_mult": (1, 2, 4, 4),
            "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
            "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
            "transformer_depth_middle": 4,
            "context_dim": 1280,
            "adm_in_channels": 2560,
        },
    ),
    "ssd-1b": (
        "SSD-1B or Segmind Vega",
        "sdxl",
        UNET
        | {
            "num_res_blocks": [2] * 3,
            "channel_mult": (1, 2, 4),
            "transformer_depth": [0, 0, 2, 2, 4, 4],
            "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
            "transformer_depth_middle": -1,
            "context_dim": 2048,
            "adm_in_channels": 2816,
        },
    ),
    "z-image-pixel": (
        "Z-Image in pixel space",
        "z-image",
        {
            "patch_size": 32,
            "in_channels": 3,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "qk_norm": True,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
}


@pytest.mark.host
@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_classes_without_support(comfyui, name: str):
    """ComfyUI's own classes, in which a patch for the base would find all its sites."""
    family, base, config = COMFYUI[name]
    module, kind = "comfy.ldm.modules.diffusionmodules.openaimodel", "UNetModel"
    if name == "z-image-pixel":
        module, kind = "comfy.ldm.lumina.model", "NextDiTPixelSpace"
    if not hasattr(importlib.import_module(module), kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    model = getattr(importlib.import_module(module), kind)(
        **config,
        device="meta",
        dtype=torch.float32,
        operations=importlib.import_module("comfy.ops").disable_weight_init,
    )
    with pytest.raises(PatchError, match=f"{base}.*found {family}.*not supported"):
        require_base(model.to("meta"), get_base(base))
    assert [b.name for b in known_bases() if naming_of(model, b)] == []
