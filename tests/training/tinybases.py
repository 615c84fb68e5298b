"""Tiny bases on disk, in the layout of diffusers: denoiser, VAE, text encoders, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.discovery import modules
from tests.releases import trainable
from tests.tiny import FAMILIES, Tiny
from tests.training import tinyanimatext, tinyflux2, tinylanguage, tinywan
from tests.training.tinykrea2 import qwen3_vl
from tests.training.tinyqwen21 import opaque_vae, qwen3_vl_generating
from tests.training.trained import Trained
from training.base.families import table
from training.base.families.table import register_family

# A chat as language models read it: who speaks, what they say, and who answers.
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
)
SIZE = 16  # pixels of a picture, 8 cells of a latent
WORDS = ["red", "green", "blue", "cat", "dog", "a", "of", "picture", "square"]
BEGIN, END, UNKNOWN = len(WORDS), len(WORDS) + 1, len(WORDS) + 2

# What families say of themselves, by the name of the tiny model: see `Trained`.
OWN: dict[str, Trained] = {
    name: one
    for module in modules("tests.training", "tiny", "trained")
    for name, one in module.trained().items()
    if name in FAMILIES
}
# The families the trainer knows, by the name of the tiny model.
TRAINED = {
    "sd15": (table.SD1, 16),
    "sd21": (table.SD1, 16),
    "sdxl": (table.SDXL, 8),
    "dit": (table.DIT, 4),
    "pixart": (table.PIXART, 4),
    "sd3": (table.STABLE3, 4),
    "sd35": (table.STABLE3, 4),
    "flux": (table.FLUX, 4),
    "flux2": (tinyflux2.DEV, 4),
    "qwen-image": (table.QWEN_IMAGE, 4),
    "z-image": (table.Z_IMAGE, 4),
    "lumina2": (table.LUMINA2, 4),
    "chroma": (table.CHROMA, 4),
    "krea2": (table.KREA2, 4),
    "qwen-image-2.1": (table.QWEN_IMAGE21, 4),
    "anima": (table.ANIMA, 4),
    "wan": (tinywan.small(table.WAN), 4),
    **{name: (own.family, 4) for name, own in OWN.items()},
}
TRAINED = {
    name: facts
    for name, facts in TRAINED.items()
    if name in FAMILIES and trainable(FAMILIES[name].base, facts[0])
}
for _name, (_family, _multiple) in TRAINED.items():
    _first = tinywan.small(table.WAN_FIRST) if _name == "wan" else None
    register_family(FAMILIES[_name].base, replace(_family, multiple=_multiple), _first)

_QWEN = ("qwen-image", "krea2", "qwen-image-2.1", "anima")
# What each family needs on the command line besides its name.
OPTIONS: dict[str, list[str]] = {
    **{
        name: ["--t5_max_token_length", "6"]
        for name in ("pixart", "sd3", "sd35", "flux", "chroma", "wan")
    },
    "dit": [],
    "flux2": ["--llm_max_token_length", "64"],  # its system prompt is longer than captions
    **{name: ["--llm_max_token_length", "24"] for name in (*_QWEN, "z-image")},
    "lumina2": ["--llm_max_token_length", "16", "--system_prompt", "a picture of"],
    **{
        name: [word for key, value in own.options.items() for word in (f"--{key}", value)]
        for name, own in OWN.items()
    },
}


def make_base(folder: Path, name: str) -> Path:
    """Writes a tiny base into a folder; returns the folder."""
    tiny = FAMILIES[name]
    model = tiny.model()
    part = "unet" if name.startswith("sd1") or name in ("sd21", "sdxl") else "transformer"
    model.save_pretrained(folder / part)
    _vae_of(name).save_pretrained(folder / "vae")
    _scheduler(name).save_pretrained(folder / "scheduler")
    for place, build in _encoders(name).items():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            build().save_pretrained(folder / place)
        tokenizer = place.replace("text_encoder", "tokenizer")
        tokenizer = "processor" if name == "qwen-image-2.1" else tokenizer
        length = 77 if "T5" not in str(build()) else 512
        length = OWN[name].tokens.get(place, 512) if name in OWN else length
        word_tokenizer(length).save_pretrained(folder / tokenizer)
    if name == "anima":
        tinyanimatext.conditioner(len(WORDS) + 3).save_pretrained(folder / "text_conditioner")
        word_tokenizer(512).save_pretrained(folder / "t5_tokenizer")
    (folder / "model_index.json").write_text(json.dumps(_index(folder, name)), encoding="utf-8")
    return folder


def _index(folder: Path, name: str) -> dict[str, object]:
    """The list of a pipeline's parts, as diffusers writes it."""
    index: dict[str, object] = {
        "_class_name": (TRAINED[name][0].pipeline if name in TRAINED else "")
        or "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
    }
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = ("config.json", "scheduler_config.json", "tokenizer_config.json")
        config = json.loads(next(part / n for n in names if (part / n).is_file()).read_text())
        of_diffusers = config.get("_class_name")
        cls = of_diffusers or config.get("architectures", ["PreTrainedTokenizerFast"])[0]
        index[part.name] = ["diffusers" if of_diffusers else "transformers", cls]
    return index


def make_vae() -> diffusers.AutoencoderKL:
    """A VAE of factor 2 with four channels."""
    return _vae(shifted=False)


def make_pictures(folder: Path, count: int = 6, captions: bool = True) -> Path:
    """Pictures of different sizes with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        size = (SIZE + 4 * (number % 2), SIZE)
        levels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
        picture = Image.fromarray(levels.to(torch.uint8).numpy())
        picture.save(folder / f"{number:02d}.png")
        if captions:
            text = f"a {WORDS[number % 3]} {WORDS[3 + number % 2]}"
            (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def make_classes(folder: Path, classes: int = 3, count: int = 2) -> Path:
    """Folders of pictures, one a class."""
    for label in range(classes):
        make_pictures(folder / str(label), count, captions=False)
    return folder


def tiny_of(name: str) -> Tiny:
    """The family in small."""
    return FAMILIES[name]


def _vae_of(name: str) -> nn.Module:
    if name in OWN:
        own = OWN[name]
        return own.vae() if own.vae is not None else _vae(own.shifted)
    if name == "flux2":
        return tinyflux2.vae()
    if name == "qwen-image-2.1":
        return opaque_vae()
    if name == "wan":
        return tinywan.video_vae(
            diffusers.AutoencoderKLWan,
            temporal=True,
            scale_factor_spatial=2,
            scale_factor_temporal=2,
        )
    if name not in _QWEN:
        return _vae(shifted=name in ("sd3", "sd35", "flux", "lumina2", "z-image", "chroma"))
    return tinywan.video_vae(diffusers.AutoencoderKLQwenImage)


def _vae(shifted: bool) -> diffusers.AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.7,
            shift_factor=0.1 if shifted else None,
        )


def _scheduler(name: str) -> diffusers.SchedulerMixin:
    if name == "wan":
        return tinywan.scheduler()
    if name in OWN:
        return diffusers.FlowMatchEulerDiscreteScheduler(**OWN[name].scheduler)
    if name in ("sd3", "sd35", "z-image", "anima"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name in ("flux", "flux2", "chroma", *_QWEN):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if name == "lumina2":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    prediction = "v_prediction" if name == "sd21" else "epsilon"
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
    )


def _encoders(name: str) -> dict[str, Callable[[], nn.Module]]:
    if name in OWN:
        made = OWN[name].encoders
        return {place: partial(build, len(WORDS) + 3) for place, build in made.items()}
    plain, projected = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    match name:
        case "sd15" | "sd21":
            return {"text_encoder": lambda: plain(_clip(12 if name == "sd15" else 20))}
        case "sdxl":
            return {
                "text_encoder": lambda: plain(_clip(12)),
                "text_encoder_2": lambda: projected(_clip(16, 16)),
            }
        case "pixart" | "chroma":
            return {"text_encoder": _t5}
        case "sd3" | "sd35":
            return {
                "text_encoder": lambda: projected(_clip(6, 4)),
                "text_encoder_2": lambda: projected(_clip(6, 6)),
                "text_encoder_3": _t5,
            }
        case "flux":
            return {"text_encoder": lambda: plain(_clip(10)), "text_encoder_2": _t5}
        case "flux2":
            return {"text_encoder": lambda: tinyflux2.mistral(len(WORDS) + 3)}
        case "lumina2":
            return {"text_encoder": lambda: tinylanguage.gemma2(len(WORDS) + 3)}
        case "qwen-image":
            return {"text_encoder": lambda: tinylanguage.qwen2_vl(len(WORDS) + 3)}
        case "krea2":
            return {"text_encoder": lambda: qwen3_vl(len(WORDS) + 3)}
        case "qwen-image-2.1":
            return {"text_encoder": lambda: qwen3_vl_generating(len(WORDS) + 3)}
        case "z-image" | "anima":
            return {"text_encoder": lambda: tinylanguage.qwen3(len(WORDS) + 3)}
        case "wan":
            return {"text_encoder": lambda: tinywan.text_encoder(len(WORDS) + 3)}
    return {}


def _clip(width: int, projection: int = 8) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )


def _t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(WORDS) + 3, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2
        )
    )


def word_tokenizer(length: int) -> transformers.PreTrainedTokenizerFast:
    """Whole words, with a begin and an end."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<b>", "<e>", "<u>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", BEGIN), ("<e>", END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<b>",
        eos_token="<e>",
        pad_token="<e>",
        unk_token="<u>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],  # older releases gave types of tokens
        chat_template=_CHAT,
    )
