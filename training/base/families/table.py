"""Which base is of which family. A new base of a known family is one line here."""

from __future__ import annotations

from dmp_common import Base, PatchError
from training.base.families.anima import Anima
from training.base.families.auraflow import AURAFLOW
from training.base.families.chroma import Chroma
from training.base.families.dit import DiT
from training.base.families.ernie import ErnieImage
from training.base.families.family import Family
from training.base.families.flux2 import Flux2, Flux2Klein
from training.base.families.hunyuanimage import HUNYUAN_IMAGE
from training.base.families.krea2 import Krea2
from training.base.families.language import Lumina2, QwenImage, ZImage
from training.base.families.qwenimage21 import QwenImage21
from training.base.families.sana import SANA
from training.base.families.transformer import SD3, Flux, PixArt
from training.base.families.unet import UNet, UNetXL
from training.base.families.video import WAN, WAN_FIRST, WAN_PICTURE, WAN_PICTURE_CLIP

_LINEAR = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "variance_type": "learned_range",
}

SD1 = UNet(
    denoiser="unet",
    model="UNet2DConditionModel",
    pipeline="StableDiffusionPipeline",
    encoders={"text_encoder": "CLIPTextModel"},
    files={"text_encoder": "clip_l"},
)
SDXL = UNetXL(
    denoiser="unet",
    model="UNet2DConditionModel",
    pipeline="StableDiffusionXLPipeline",
    encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    files={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
)
# Classes come from the data; with --text_conditional there is a text encoder besides.
DIT = DiT(
    denoiser="transformer",
    model="DiTTransformer2DModel",
    conditioning="label",
    square=True,
    guidance=4.0,
    scheduler=_LINEAR,
    vae_id="stabilityai/sd-vae-ft-ema",
)
DIGITS = DiT(
    denoiser="transformer",
    model="DiTTransformer2DModel",
    vae=False,
    conditioning="label",
    multiple=2,
    square=True,
    guidance=1.0,
)
PIXART = PixArt(
    denoiser="transformer",
    model="PixArtTransformer2DModel",
    encoders={"text_encoder": "T5EncoderModel"},
    files={"text_encoder": "t5xxl"},
    multiple=32,
    guidance=4.5,
    scheduler=_LINEAR,
)
STABLE3 = SD3(
    denoiser="transformer",
    model="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    files={"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    guidance=7.0,
)
FLUX = Flux(
    denoiser="transformer",
    model="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    files={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    guidance=1.0,  # told to the model, see Previews
    even=True,
    fast="^(?!.*dev).*schnell",  # merges of both are told a scale
    undistilled="FLUX.1-dev",
)
CHROMA = Chroma(
    denoiser="transformer",
    model="ChromaTransformer2DModel",
    since="0.36",  # before, T5 sees a token of padding
    pipeline="ChromaPipeline",
    encoders={"text_encoder": "T5EncoderModel"},
    files={"text_encoder": "t5xxl"},
    guidance=5.0,
    even=True,
)
KREA2 = Krea2(
    denoiser="transformer",
    model="Krea2Transformer2DModel",
    since="0.39",
    pipeline="Krea2Pipeline",
    autoencoder="AutoencoderKLQwenImage",
    encoders={"text_encoder": "Qwen3VLModel"},
    files={"text_encoder": "text_encoder"},
    guidance=5.5,  # 1 where it is distilled
    even=True,
    fast="turbo|tdm",
    undistilled="Krea-2-Raw",
)
FLUX2 = Flux2(
    denoiser="transformer",
    model="Flux2Transformer2DModel",
    since="0.37",
    pipeline="Flux2Pipeline",
    autoencoder="AutoencoderKLFlux2",
    encoders={"text_encoder": "MistralModel"},
    files={"text_encoder": "text_encoder"},
    guidance=4.0,  # told to the model
    even=True,
)
FLUX2_KLEIN = Flux2Klein(
    denoiser="transformer",
    model="Flux2Transformer2DModel",
    since="0.37",
    pipeline="Flux2KleinPipeline",
    autoencoder="AutoencoderKLFlux2",
    encoders={"text_encoder": "Qwen3Model"},
    files={"text_encoder": "text_encoder"},
    guidance=4.0,  # 1 where it is distilled
    even=True,
    fast="^(?!.*base).*klein",
    undistilled="FLUX.2-klein-base-4B",
)
QWEN_IMAGE21 = QwenImage21(
    denoiser="transformer",
    model="QwenImage21Transformer2DModel",
    since="0.41",
    pipeline="QwenImage21Pipeline",
    autoencoder="AutoencoderKLQwenImage21",
    encoders={"text_encoder": "Qwen3VLForConditionalGeneration"},
    tokenizers={"text_encoder": "processor"},
    guidance=1.0,
    even=True,
)
LUMINA2 = Lumina2(
    denoiser="transformer",
    model="Lumina2Transformer2DModel",
    pipeline="Lumina2Pipeline",
    encoders={"text_encoder": "Gemma2Model"},
    files={"text_encoder": "text_encoder"},
    guidance=4.0,
    even=True,
)
QWEN_IMAGE = QwenImage(
    denoiser="transformer",
    model="QwenImageTransformer2DModel",
    since="0.37",  # before, the model sees padding
    pipeline="QwenImagePipeline",
    autoencoder="AutoencoderKLQwenImage",
    encoders={"text_encoder": "Qwen2_5_VLModel"},
    files={"text_encoder": "text_encoder"},
    guidance=4.0,
    even=True,
)
Z_IMAGE = ZImage(
    denoiser="transformer",
    model="ZImageTransformer2DModel",
    since="0.36",
    pipeline="ZImagePipeline",
    encoders={"text_encoder": "Qwen3Model"},
    files={"text_encoder": "text_encoder"},
    guidance=5.0,  # 4 in its pipeline, which counts from 0; 1 for Turbo, which is distilled
    even=True,
    fast="turbo",
    undistilled="Z-Image",
)
ERNIE_IMAGE = ErnieImage(
    denoiser="transformer",
    model="ErnieImageTransformer2DModel",
    since="0.38",
    pipeline="ErnieImagePipeline",
    autoencoder="AutoencoderKLFlux2",
    encoders={"text_encoder": "Ministral3Model"},
    files={"text_encoder": "text_encoder"},
    guidance=4.0,  # 1 where it is distilled
    even=True,
    fast="turbo",
    undistilled="ERNIE-Image",
)

ANIMA = Anima(
    denoiser="transformer",
    model="CosmosTransformer3DModel",
    since="0.39",
    pipeline="AnimaModularPipeline",
    autoencoder="AutoencoderKLQwenImage",
    encoders={"text_encoder": "Qwen3Model"},
    files={"text_encoder": "text_encoder"},
    conditioner="AnimaTextConditioner",
    words=("t5_tokenizer",),
    guidance=4.0,
    even=True,
)
_FAMILIES: dict[str, Family] = {
    "digits": DIGITS,
    "cifar10": DIGITS,
    "cifar10-s": DIGITS,
    "sd15": SD1,
    "sd21": SD1,
    "sdxl": SDXL,
    **{f"dit-{size}/{p}": DIT for size in ("s", "b", "l", "xl") for p in (2, 4, 8)},
    "pixart": PIXART,
    "sd3": STABLE3,
    "sd35-medium": STABLE3,
    "sd35-large": STABLE3,
    "flux": FLUX,
    "flux2": FLUX2,
    **dict.fromkeys(("flux2-klein-4b", "flux2-klein-9b"), FLUX2_KLEIN),
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
    "lumina2": LUMINA2,
    "ernie-image": ERNIE_IMAGE,
    "chroma": CHROMA,
    "krea2": KREA2,
    "qwen-image-2.1": QWEN_IMAGE21,
    "anima": ANIMA,
    **dict.fromkeys(("wan-1.3b", "wan-14b", "wan22-5b"), WAN),
    "wan21-i2v-14b": WAN_PICTURE_CLIP,
    "wan22-i2v-14b": WAN_PICTURE,
    "auraflow": AURAFLOW,
    "hunyuan-image": HUNYUAN_IMAGE,
    **dict.fromkeys(("sana", "sana-0.6b"), SANA),
}

# Families of models of text that can also be told of first frames (--first_frames).
_FIRST: dict[str, Family] = {"wan22-5b": WAN_FIRST}


def register_family(base: Base | str, family: Family, first: Family | None = None) -> None:
    """Says of which family a base is that was added with `register_base`.

    Args:
        base: or its name.
        family: of it.
        first: with --first_frames; None where it cannot be told of first frames.
    """
    name = base if isinstance(base, str) else base.name
    _FAMILIES[name] = family
    if first is not None:
        _FIRST[name] = first


def family_of(base: Base, first_frames: bool = False) -> Family:
    """The family of a base.

    Args:
        base: the base.
        first_frames: as a model that is told of the first frame of a video.

    Raises:
        PatchError: the trainer knows none, or none that is told of first frames.
    """
    if base.name not in _FAMILIES:
        raise PatchError(
            f"expected a base the trainer knows ({', '.join(_FAMILIES)}), found {base.name}: "
            "add it to training/base/families/table.py."
        )
    family = _FAMILIES[base.name]
    if not first_frames or family.first_frame:
        return family
    if base.name not in _FIRST:
        raise PatchError(
            f"expected a base that can be told of first frames ({', '.join(_FIRST)}) with "
            f"--first_frames, found {base.name}: leave it out."
        )
    return _FIRST[base.name]
