"""The bases: families of another kind, which are refused by name in the core and by their files."""

from __future__ import annotations

import diffusers
import pytest

from dmp_common import PatchError, attach, detect_base, get_base
from dmp_common.bases.base import Probe
from dmp_common.bases.detect import PREFIXES, bases_of_shapes, require_base, stranger_of_shapes
from dmp_common.bases.otherfamilies import OTHER_FAMILIES
from dmp_common.bases.strangers import find_stranger
from tests.dmp_common.test_bases_strangers import default, on_meta
from tests.tiny import FAMILIES

ONE = dict(num_layers=1)
WAN = "Wan VACE, Fun, Camera, Animate, S2V or another sibling of Wan"
HUNYUAN = "HunyuanVideo, or a distilled or refining HunyuanImage"
HUNYUAN_SMALL = dict(num_layers=1, num_single_layers=1, num_refiner_layers=1)
SANA = "Sana 1.5, Sprint or Video, or a file of Sana's original code"
# Families of no base's kind: name, class of diffusers, and a small configuration.
OTHERS = {
    "ideogram4": ("Ideogram 4", "Ideogram4Transformer2DModel", ONE),
    "ltx": ("LTX-Video or LTX-2", "LTXVideoTransformer3DModel", ONE),
    "ltx2": ("LTX-Video or LTX-2", "LTX2VideoTransformer3DModel", ONE),
    **{
        f"hunyuan-image-{name}": (HUNYUAN, "HunyuanImageTransformer2DModel", HUNYUAN_SMALL | config)
        for name, config in (
            ("distilled", dict(use_meanflow=True, guidance_embeds=True)),
            ("refiner", dict(in_channels=128, patch_size=(1, 1, 1), rope_axes_dim=(16, 56, 56))),
        )
    },
    "hunyuan-video": (HUNYUAN, "HunyuanVideoTransformer3DModel", HUNYUAN_SMALL),
    "hunyuan-video-1.5": (
        HUNYUAN, "HunyuanVideo15Transformer3DModel", dict(num_layers=1, num_refiner_layers=1)
    ),
    "hunyuan-dit": (
        "Hunyuan-DiT",
        "HunyuanDiT2DModel",
        dict(
            num_layers=2, hidden_size=32, num_attention_heads=2, attention_head_dim=16,
            in_channels=4, patch_size=2, sample_size=8, cross_attention_dim=8,
            cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=4, text_len_t5=4,
        ),
    ),
    "hidream": (
        "HiDream",
        "HiDreamImageTransformer2DModel",
        dict(
            num_layers=1, num_single_layers=1, in_channels=4, out_channels=4, patch_size=2,
            attention_head_dim=16, num_attention_heads=2, caption_channels=[8, 8],
            text_emb_dim=8, axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=[0],
        ),
    ),
    "sana-1.5": (SANA, "SanaTransformer2DModel", ONE | dict(qk_norm="rms_norm_across_heads")),
    "sana-sprint": (SANA, "SanaTransformer2DModel", ONE | dict(guidance_embeds=True)),
    "sana-video": (SANA, "SanaVideoTransformer3DModel", ONE),
    "cosmos": ("Cosmos", "CosmosTransformer3DModel", ONE),
    "cosmos-predict2-14b": (
        "Cosmos", "CosmosTransformer3DModel",
        dict(num_layers=1, num_attention_heads=40, extra_pos_embed_type=None),
    ),
    "cosmos-predict2-video": (
        "Cosmos", "CosmosTransformer3DModel",
        dict(num_layers=1, num_attention_heads=16, in_channels=17, extra_pos_embed_type=None),
    ),
    "cosmos-predict2.5": (
        "Cosmos", "CosmosTransformer3DModel",
        dict(
            num_layers=1, num_attention_heads=16, extra_pos_embed_type=None,
            use_crossattn_projection=True,
        ),
    ),
    "wan-vace": (WAN, "WanVACETransformer3DModel", dict(num_layers=1, vace_layers=[0])),
    "wan-fun": (WAN, "WanTransformer3DModel", dict(num_layers=1, in_channels=48)),
    "skyreels": (WAN, "SkyReelsV2Transformer3DModel", {**ONE, "inject_sample_info": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_family_is_named_by_its_modules_and_by_its_files(name: str):
    family, kind, config = OTHERS[name]
    model = on_meta(default(kind, **config))
    for refuse in (detect_base, lambda model: require_base(model, get_base("sdxl"))):
        with pytest.raises(PatchError, match=f"found {family} .{kind}.*not supported"):
            refuse(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert stranger_of_shapes(shapes).name == family


def test_the_pipeline_tells_cosmos_from_anima():
    """Their transformers are equal, so that of the pipeline alone the class tells."""
    tiny = FAMILIES.get("anima") or pytest.skip("needs a diffusers that knows it")

    class Mine(diffusers.Cosmos2TextToImagePipeline):
        def __init__(self) -> None:  # without its safety checker
            self.transformer = tiny.model()

    for refuse in (detect_base, lambda pipe: attach(pipe, tiny.patch())):
        with pytest.raises(PatchError, match="found Cosmos .Cosmos2TextToImagePipeline., which is"):
            refuse(Mine())
    assert detect_base(tiny.model()) is tiny.base


def test_the_class_tells_cosmos_from_anima_without_its_adapter():
    """Forge Neo keeps the adapter with the text encoder."""
    parts = {"blocks.0.mlp.layer1", "t_embedder"}

    def held(probe: Probe) -> bool:
        return probe.attribute is None and (probe.path in parts) == probe.value

    assert find_stranger(held, "MiniTrainDIT").name == "Cosmos"
    assert find_stranger(held, "Anima") is None


# A few tensors of each as its original code, and so ComfyUI, names them.
ORIGINAL_NAMES = {
    "HiDream": ["caption_projection.0.linear.weight"],
    "HiDream-O1": ["t_embedder1.mlp.0.weight", "x_embedder.proj1.weight"],
    "Ideogram 4": ["embed_image_indicator.weight"],
    "LTX-Video or LTX-2": ["patchify_proj.weight", "adaln_single.linear.weight"],
    HUNYUAN: ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "time_r_in.mlp.0.weight"],
    "Hunyuan-DiT": ["mlp_t5.0.weight"],
    SANA: ["attention_y_norm.weight"],
    "OmniGen2": ["ref_image_patch_embedder.weight", "time_caption_embed.caption_embedder.0.weight"],
    "Chroma Radiance": ["distilled_guidance_layer.norms.0.scale", "nerf_blocks.0.norm.scale"],
    "Cosmos": ["blocks.0.mlp.layer1.weight", "t_embedder.1.linear_1.weight"],
    WAN: ["patch_embedding.weight", "blocks.0.ffn.0.weight", "control_adapter.conv.weight"],
}


@pytest.mark.parametrize("family", ORIGINAL_NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_another_family_is_named_by_its_original_file(family: str, prefix: str):
    shapes = {prefix + name: (4, 4) for name in ORIGINAL_NAMES[family]}
    assert bases_of_shapes(shapes) == []
    assert stranger_of_shapes(shapes).name == family


def test_every_family_is_shown_to_be_recognised():
    named = {family for family, _, _ in OTHERS.values()} | set(ORIGINAL_NAMES)
    assert {family.name for family in OTHER_FAMILIES} == named
